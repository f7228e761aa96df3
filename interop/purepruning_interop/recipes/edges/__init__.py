"""What a compressor does to a model of each framework: one module for each, with the same names.

``snapshot(model)`` and ``restored(model, snapshot)``: all of its arrays; ``params(model)`` and
``with_params(model, params)``: those that rules name. ``restored`` writes into a model that is
changed in place, and returns it; so do ``written`` and, of the optimizer, ``keep``.
"""
