"""Stage one: source -> units -> documents -> ids -> shards + manifest. Never imports `train`."""
