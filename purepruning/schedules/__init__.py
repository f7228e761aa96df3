"""Schedules: pure state machines that say when to prune and how much, one file each."""
