"""Scores and counts to masks: exactly k units, the same ones in every framework.

One rule throughout: the units of lowest score are pruned, and of equal scores those that come
first. Positions count in the parameter's own layout (C order); in global scope layers come in the
order of their names, and where layers are stacked, the first of the stack first.
"""
