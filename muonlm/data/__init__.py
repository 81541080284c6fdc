"""Text to training batches: document sources, the tokenizer, memory-mapped token shards, the resumable `prepare`
pipeline that writes them, checked reading of them, and the seeded order in which training consumes sequences."""
