"""Data: documents to token shards, their order, and the stream to the workers."""
