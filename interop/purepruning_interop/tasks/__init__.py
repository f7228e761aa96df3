"""Tasks: what is pruned, how it is trained, and how it is judged, as pure functions over params.

``purepruning run``, ``purepruning study`` and :func:`purepruning_interop.study.run_study` are given
one. It is a value of :class:`Task`, or a function without arguments that returns one, and stands in
a module of yours: ``package.module:task``. Shipped tasks go by their names alone: ``digits``.
"""

from purepruning_interop.tasks.find import SHIPPED, find_task
from purepruning_interop.tasks.task import Objective, Task

__all__ = ["Task", "Objective", "find_task", "SHIPPED"]
