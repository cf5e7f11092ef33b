"""From files to tensors: rows of any known shape, chat template to ids, packed batches."""
