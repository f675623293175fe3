"""The device side: shape buckets, compiled programs, the model runner and its caches."""
