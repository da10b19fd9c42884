"""What the server measures, for Prometheus and for its web page."""
