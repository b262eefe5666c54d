"""Optimizers, one file each; parameter groups in `groups`; learning-rate schedules in `schedules`."""
