"""What happens beside the steps of a run. `callbacks` in the configuration names each by `_target_`, in order."""
