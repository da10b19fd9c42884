"""The engine on a virtual clock: the real scheduler, block pool and prefix cache, with simulated time and no tensors."""
