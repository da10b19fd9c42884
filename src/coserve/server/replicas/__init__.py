"""Several engines behind one address: what the ingress and the replicas say to each other, and what each of them does."""
