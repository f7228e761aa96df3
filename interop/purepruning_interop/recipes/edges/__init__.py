"""What a compressor does to a model of each framework: one module for each, with the same names.

``snapshot(model)`` and ``restored(model, snapshot)``: all of its arrays; ``params(model)`` and
``written(model, params)``: those that rules name. ``restored`` and ``written`` write into a model
that is changed in place, and return it. ``arrays(model)``: what a file of it holds.
"""
