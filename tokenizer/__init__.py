"""A site's records become token sequences: MEDS events, survey, codebook, encoding, store, windows."""
