"""Many adapters on one base: the pool that holds them, and the modules that use it."""
