"""streamhouse health: for the health checks of containers."""

import click

from streamhouse_cli.failures import CliError, one_line
from streamhouse_cli.options import HostPort, Number


@click.command(short_help="Ask a server for its health; for container checks.")
@click.argument("address", type=HostPort(), metavar="HOST:PORT")
@click.option("--service", default="", help="Full gRPC service name, e.g. streamhouse.v1.Ingest. Default: the server.")
@click.option("--timeout-ms", type=Number(1, 600_000), default=3_000, show_default=True, help="How long to wait.")
def health(address: str, service: str, timeout_ms: int) -> None:
    """Ask the server at HOST:PORT for its health; exit 0 when it serves, 1 otherwise."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_ms / 1000
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise CliError(f"{address}: no service {service!r} here") from error
            raise CliError(f"{address}: {error.code().name}: {one_line(error.details() or 'no answer')}") from error
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise CliError(f"{address}: {state}")
    click.echo(state)
