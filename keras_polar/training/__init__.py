"""The run: `apply`, `fit`, settling, compaction."""
