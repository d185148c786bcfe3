"""Sources of `data.records`, one file per kind. Each opens its files when it reads, so copies in other processes are safe."""
