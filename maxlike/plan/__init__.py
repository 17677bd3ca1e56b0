"""`--job plan`: what a run will need and how fast it can be, before any device is held."""
