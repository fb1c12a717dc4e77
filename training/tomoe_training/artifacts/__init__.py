"""Files that are read and written: dense checkpoints, adapters, exported checkpoints, model cards, provenance."""
