"""One training step of one process of many on a simulated GPU: memory, syncs, kernels, traffic and a roofline time."""
