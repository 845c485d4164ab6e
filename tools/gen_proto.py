"""Generates the Python side of proto/ into libs/shproto: messages, and one typed API per service.

`services.py` gets, for every service, a Protocol (what the service's own `api.py` offers and what other
services may call, in process or over the network) and a gRPC client that implements the same Protocol.
Run with --check to fail when the checked-in files are not current.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto

ROOT = Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "proto"
TARGET_DIR = ROOT / "libs" / "shproto" / "shproto"

HEADER = '''"""Typed service APIs, generated from proto/ by tools/gen_proto.py: do not edit."""

from collections.abc import AsyncIterator
from typing import Protocol

from shproto.rpc import Caller
from shproto.v1 import {modules}
'''


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def run_protoc(out: Path) -> FileDescriptorSet:
    """Writes the message modules below `out` and returns the descriptors."""
    protos = sorted(str(path.relative_to(PROTO_DIR)) for path in PROTO_DIR.rglob("*.proto"))
    descriptor_path = out / "descriptors.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_DIR}", f"--python_out={out}"]
    command += [f"--mypy_out=quiet:{out}", f"--descriptor_set_out={descriptor_path}", *protos]
    subprocess.run(command, check=True)
    return FileDescriptorSet.FromString(descriptor_path.read_bytes())


def message_modules(out: Path) -> Iterator[tuple[str, str]]:
    """Every generated module as (name, text), imports rewritten from the proto path to the package."""
    for path in sorted((out / "streamhouse" / "v1").iterdir()):
        text = path.read_text()
        text = re.sub(r"^from streamhouse\.v1 import", "from shproto.v1 import", text, flags=re.M)
        yield path.name, text.replace("streamhouse.v1.", "shproto.v1.") if path.suffix == ".pyi" else text


def type_name(message: str, modules: dict[str, str]) -> str:
    short = message.rsplit(".", 1)[1]
    return f"{modules[short]}.{short}"


def signature(method: MethodDescriptorProto, modules: dict[str, str]) -> str:
    request, response = type_name(method.input_type, modules), type_name(method.output_type, modules)
    argument = f"requests: AsyncIterator[{request}]" if method.client_streaming else f"request: {request}"
    if method.server_streaming:
        return f"def {snake_case(method.name)}(self, {argument}) -> AsyncIterator[{response}]"
    return f"async def {snake_case(method.name)}(self, {argument}) -> {response}"


def client_body(service: str, method: MethodDescriptorProto, modules: dict[str, str]) -> str:
    response = type_name(method.output_type, modules)
    path = f'"/streamhouse.v1.{service}/{method.name}"'
    if method.client_streaming:
        return f"return self._connection.stream_stream({path}, requests, {response})"
    if method.server_streaming:
        return f"return self._connection.unary_stream({path}, request, {response})"
    return f"return await self._connection.unary({path}, request, {response})"


def service_code(service: ServiceDescriptorProto, modules: dict[str, str]) -> str:
    lines = [f"class {service.name}Api(Protocol):"]
    for method in service.method:
        lines.append(f"    {signature(method, modules)}: ...")
    lines += [
        "",
        "",
        f"class {service.name}Client:",
        "    def __init__(self, connection: Caller) -> None:",
    ]
    lines += ["        self._connection = connection", ""]
    for method in service.method:
        lines += [
            f"    {signature(method, modules)}:",
            f"        {client_body(service.name, method, modules)}",
            "",
        ]
    lines += ["    async def close(self) -> None:", "        await self._connection.close()"]
    return "\n".join(lines)


def services_module(descriptors: FileDescriptorSet) -> str:
    modules: dict[str, str] = {}
    used: set[str] = set()
    for file in descriptors.file:
        module = Path(file.name).stem + "_pb2"
        modules |= {message.name: module for message in file.message_type}
    bodies = []
    for file in descriptors.file:
        for service in file.service:
            bodies.append(service_code(service, modules))
            for method in service.method:
                used |= {modules[name.rsplit(".", 1)[1]] for name in (method.input_type, method.output_type)}
    return HEADER.format(modules=", ".join(sorted(used))) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def generate() -> dict[Path, str]:
    with tempfile.TemporaryDirectory() as folder:
        descriptors = run_protoc(Path(folder))
        files = {TARGET_DIR / "v1" / name: text for name, text in message_modules(Path(folder))}
    files[TARGET_DIR / "services.py"] = services_module(descriptors)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is not current")
    check = parser.parse_args().check
    stale = [path for path, text in generate().items() if not path.exists() or path.read_text() != text]
    if check and stale:
        print("not current, run tools/gen_proto.py:", *(path.relative_to(ROOT) for path in stale), sep="\n  ")
        return 1
    for path, text in generate().items() if stale else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{len(stale)} files written" if stale else "generated code is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
