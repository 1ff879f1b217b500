"""Several processes: ranks, sharded weights, stopping together."""
