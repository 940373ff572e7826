"""Scripts that measure; a package, because others also install one of this name (opacus does)."""
