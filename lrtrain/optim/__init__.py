"""Optimizers, one file each; who gets what in `groups`; learning-rate schedules in `schedules`."""
