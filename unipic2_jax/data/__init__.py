"""Records, readers, buckets, mixtures and preparation; it imports flow, optim, parallel, core and pictures."""
