"""The policy: loading, saving, the forward pass, the head, adapters, and shards over several processes."""
