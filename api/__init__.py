"""HTTP, database, reconciler, command line and client. Never imports torch."""
