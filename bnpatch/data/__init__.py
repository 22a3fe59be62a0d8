"""Read images and targets from files, arrays and loaders, in batches."""
