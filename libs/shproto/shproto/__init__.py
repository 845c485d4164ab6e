"""Messages of the wire protocol, typed errors and events."""

import os

# Read once, when grpc is imported. gRPC's own handlers around a fork restart threads in the child, which crash there if
# the parent had open connections; without them a child is sound as long as it calls nothing of gRPC (shproto.forks).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
