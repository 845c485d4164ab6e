"""Protocol Buffers schemas, cut down to the fields that a table declares.

The cut-down schema is what values are decoded with: fields that no column names are skipped as unknown ones are, types
that refer to themselves end where the columns do, and memory is that of the columns. A map is a list of entries here,
as it is on the wire.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError
from shproto.errors import InvalidStatement

from streamhouse_sql.core.shapes import SCALAR, Shape

OPTIONS = ("descriptor", "message")
_Field = descriptor_pb2.FieldDescriptorProto
# Messages that stand for one value, and decode to a column of it.
SCALAR_MESSAGES = {
    "google.protobuf.Timestamp",
    "google.protobuf.Duration",
    *(
        f"google.protobuf.{name}Value"
        for name in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
    ),
}
SYNTAXES = ("", "proto2", "proto3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtobufSchema:
    """Schema of a table's values: a serialised FileDescriptorSet, and the full name of the message."""

    descriptor_set: bytes
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A schema with the declared fields alone. `names`: of its fields, by column. `items_width`: number of values that
    an item of a repeated message has at most, 0 without one."""

    descriptor_set: bytes
    message: str
    names: tuple[tuple[str, str], ...]
    items_width: int


def protobuf_schema(given: dict[str, str]) -> ProtobufSchema:
    """Returns the schema of the options of WITH. Raises InvalidStatement."""
    for name in OPTIONS:
        if not given.get(name):
            raise InvalidStatement(
                "format protobuf needs descriptor = '…', the base64 of a FileDescriptorSet (protoc --include_imports "
                "--descriptor_set_out), and message = '…', the full name of the message",
                clause=name,
            )
    try:
        data = base64.b64decode("".join(given["descriptor"].split()), validate=True)
        files = descriptor_pb2.FileDescriptorSet.FromString(data)
    except (binascii.Error, DecodeError) as error:
        raise InvalidStatement(
            f"descriptor is not the base64 of a FileDescriptorSet: {error}", clause="descriptor"
        ) from error
    schema = ProtobufSchema(descriptor_set=data, message=given["message"].removeprefix("."))
    _Projector(files).find(schema.message)
    return schema


def project(schema: ProtobufSchema, columns: Sequence[tuple[str, Shape]]) -> Projection:
    """Returns the schema of these columns. Raises InvalidStatement for a column that the message does not have, or has
    in another shape."""
    projector = _Projector(descriptor_pb2.FileDescriptorSet.FromString(schema.descriptor_set))
    message = projector.message(schema.message, columns, "column ")
    return Projection(
        descriptor_set=projector.result.SerializeToString(),
        message=message,
        names=tuple(projector.names),
        items_width=projector.items_width,
    )


class _Projector:
    """Makes a descriptor set with a file for each message and enumeration that is needed."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self.result = descriptor_pb2.FileDescriptorSet()
        self.names: list[tuple[str, str]] = []
        self.items_width = 0
        self._files = {file.name: file for file in files.file}
        self._messages: dict[str, tuple[descriptor_pb2.FileDescriptorProto, descriptor_pb2.DescriptorProto]] = {}
        self._enums: dict[str, tuple[descriptor_pb2.FileDescriptorProto, descriptor_pb2.EnumDescriptorProto]] = {}
        self._made: dict[str, str] = {}  # file by full name, of enumerations and well-known messages
        for file in files.file:
            prefix = f"{file.package}." if file.package else ""
            for enum in file.enum_type:
                self._enums[prefix + enum.name] = (file, enum)
            for name, message in _nested(prefix, file.message_type):
                self._messages[name] = (file, message)
                for enum in message.enum_type:
                    self._enums[f"{name}.{enum.name}"] = (file, enum)

    def find(self, name: str) -> tuple[descriptor_pb2.FileDescriptorProto, descriptor_pb2.DescriptorProto]:
        """Returns a message and its file."""
        found = self._messages.get(name)
        if found is None:
            nearest = difflib.get_close_matches(name, self._messages, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidStatement(f"descriptor has no message {name!r}{hint}", clause="message")
        if found[0].syntax not in SYNTAXES:
            raise InvalidStatement(
                f"{found[0].name}: syntax {found[0].syntax!r} is not supported; proto2 and proto3 are",
                clause="descriptor",
            )
        return found

    def message(self, name: str, fields: Sequence[tuple[str, Shape]], path: str) -> str:
        """Makes the message with these fields. Returns its full name."""
        source_file, source = self.find(name)
        number = len(self.result.file)
        file = self.result.file.add(name=f"{number}.proto", package=f"p{number}", syntax=source_file.syntax)
        if source.options.map_entry:  # of proto3, in which a key or value that is not there is the default
            file.syntax = "proto3"
        target = file.message_type.add(name="M")
        by_name = {field.name.lower(): field for field in source.field}
        oneofs: dict[int, int] = {}
        for column, shape in fields:
            field = by_name.get(column.lower())
            if field is None:
                nearest = difflib.get_close_matches(column, [field.name for field in source.field], 1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise InvalidStatement(f"{path}{column}: message {name} has no field {column!r}{hint}", name=column)
            copy = target.field.add()
            copy.CopyFrom(field)
            copy.ClearField("options")
            if field.options.HasField("packed"):
                copy.options.packed = field.options.packed
            if field.HasField("oneof_index"):
                index = oneofs.setdefault(field.oneof_index, len(oneofs))
                copy.oneof_index = index
            if path == "column ":
                self.names.append((column, field.name))
            self._field(file, copy, shape, f"{path}{column}")
        # Of each oneof the declared members; those of `optional` fields come last, as they have to.
        order = sorted(oneofs, key=lambda index: _is_synthetic(target, oneofs[index]))
        places = {oneofs[index]: place for place, index in enumerate(order)}
        target.oneof_decl.extend(source.oneof_decl[index] for index in order)
        for copy in target.field:
            if copy.HasField("oneof_index"):
                copy.oneof_index = places[copy.oneof_index]
        return f"p{number}.M"

    def _field(
        self,
        file: descriptor_pb2.FileDescriptorProto,
        field: descriptor_pb2.FieldDescriptorProto,
        shape: Shape,
        path: str,
    ) -> None:
        type_name = field.type_name.removeprefix(".")
        is_repeated = field.label == _Field.LABEL_REPEATED
        if field.type == _Field.TYPE_GROUP:
            raise InvalidStatement(f"{path}: groups are not supported", name=field.name)
        if field.type == _Field.TYPE_MESSAGE and type_name not in SCALAR_MESSAGES:
            if self.find(type_name)[1].options.map_entry:
                inner = Shape("struct", fields=(("key", SCALAR), ("value", _item("map", shape, path))))
            else:
                inner = _item("list", shape, path) if is_repeated else shape
            _expect("struct", inner, path)
            field.type_name = f".{self.message(type_name, inner.fields, f'{path}.')}"
            _import(file, f"{field.type_name[2:].partition('.')[0]}.proto")
            if is_repeated:
                self.items_width = max(self.items_width, _width(inner))
            return
        _expect("scalar", _item("list", shape, path) if is_repeated else shape, path)
        if field.type == _Field.TYPE_ENUM:
            _import(file, self._enum(field, type_name))
        elif field.type == _Field.TYPE_MESSAGE:
            _import(file, self._well_known(type_name))

    def _enum(self, field: descriptor_pb2.FieldDescriptorProto, name: str) -> str:
        """Makes the enumeration of a field. Returns its file."""
        if name not in self._enums:
            raise InvalidStatement(f"descriptor has no enumeration {name!r}", clause="descriptor")
        if name not in self._made:
            source_file, source = self._enums[name]
            number = len(self.result.file)
            file = self.result.file.add(name=f"{number}.proto", package=f"p{number}", syntax=source_file.syntax)
            file.enum_type.add().CopyFrom(source)
            self._made[name] = file.name
        package = f"p{self._made[name].partition('.')[0]}"
        field.type_name = f".{package}.{name.rpartition('.')[2]}"
        return self._made[name]

    def _well_known(self, name: str) -> str:
        if name not in self._made:
            source = self.find(name)[0]
            self.result.file.add().CopyFrom(source)
            for other, (file, _) in self._messages.items():
                if file is source:
                    self._made[other] = source.name
        return self._made[name]


def _nested(
    prefix: str, messages: Sequence[descriptor_pb2.DescriptorProto]
) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in messages:
        yield prefix + message.name, message
        yield from _nested(f"{prefix}{message.name}.", message.nested_type)


def _is_synthetic(message: descriptor_pb2.DescriptorProto, oneof: int) -> bool:
    """Returns True for the oneof that stands for `optional` of proto3."""
    return any(f.proto3_optional for f in message.field if f.HasField("oneof_index") and f.oneof_index == oneof)


def _expect(kind: str, shape: Shape, path: str) -> None:
    if shape.kind != kind:
        wanted = Shape(kind).describe()
        raise InvalidStatement(f"{path}: the column has {shape.describe()}, the schema {wanted}", name=path)


def _item(kind: str, shape: Shape, path: str) -> Shape:
    _expect(kind, shape, path)
    assert shape.of is not None
    return shape.of


def _width(shape: Shape) -> int:
    """Returns the number of values in an item."""
    if shape.of is not None:
        return 1 + _width(shape.of)
    return sum(_width(field) for _, field in shape.fields) if shape.fields else 1


def _import(file: descriptor_pb2.FileDescriptorProto, name: str) -> None:
    if name not in file.dependency:
        file.dependency.append(name)
