"""Parts that every service process needs around its own work: settings, clock, telemetry, logging, the gRPC server."""
