"""Callbacks, which run between the steps. `callbacks` in the configuration lists them by `_target_`, in order."""
