"""Policy of several replicas behind one address: pure, without I/O, threads or clocks of its own."""
