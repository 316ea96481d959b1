"""From a file of rows to packed batches: rows -> prompts -> tokens -> packing."""
