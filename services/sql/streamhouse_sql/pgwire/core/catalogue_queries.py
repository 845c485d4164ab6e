"""Queries of PostgreSQL's catalogue, as clients write them, to SQL for DuckDB over the catalogue's tables. Pure.

A query is of the catalogue if it reads pg_catalog or information_schema, or reads nothing and calls a function that is
PostgreSQL's own. It may read nothing else: no topics, no files, no state of DuckDB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from streamhouse_sql.pgwire.core.arguments import array_of_text
from streamhouse_sql.pgwire.core.catalogue_rows import SHAPES, VERSION
from streamhouse_sql.pgwire.core.errors import PgError
from streamhouse_sql.pgwire.core.session import DATABASE
from streamhouse_sql.pgwire.core.types import TEXT

if TYPE_CHECKING:
    from streamhouse_sql.pgwire.core.session import Session

SCHEMA = "pg"
_MAYBE = re.compile(
    r"pg_|information_schema|current_|session_user|\buser\b|\bversion\s*\(|set_config|has_\w+_privilege|format_type"
    r"|to_reg|_description|::\s*reg|quote_|inet_",
    re.IGNORECASE,
)
# Names and parameters of PostgreSQL's functions, with DuckDB's expression of each. Parts that do not exist here, as
# the text of an index, is NULL.
_NULLS = (
    "pg_get_expr(a, b)", "pg_get_expr(a, b, c)", "pg_get_constraintdef(a)", "pg_get_constraintdef(a, b)",
    "pg_get_indexdef(a)", "pg_get_indexdef(a, b, c)", "pg_get_viewdef(a)", "pg_get_viewdef(a, b)",
    "pg_get_ruledef(a)", "pg_get_ruledef(a, b)", "pg_get_triggerdef(a)", "pg_get_triggerdef(a, b)",
    "pg_get_partkeydef(a)", "pg_get_statisticsobjdef_columns(a)", "pg_get_function_result(a)",
    "pg_get_function_arguments(a)", "pg_get_function_identity_arguments(a)", "pg_get_functiondef(a)",
    "pg_get_serial_sequence(a, b)", "obj_description(a)", "obj_description(a, b)", "shobj_description(a, b)",
    "pg_advisory_unlock_all()", "inet_client_addr()", "inet_server_addr()", "inet_client_port()",
    "inet_server_port()",
)  # fmt: skip
_TRUE = (
    "pg_type_is_visible(a)", "pg_function_is_visible(a)", "pg_operator_is_visible(a)", "pg_opclass_is_visible(a)",
    "pg_collation_is_visible(a)", "pg_conversion_is_visible(a)", "pg_statistics_obj_is_visible(a)",
    "pg_has_role(a, b)", "pg_has_role(a, b, c)", "has_function_privilege(a, b)", "has_function_privilege(a, b, c)",
)  # fmt: skip
_SIZES = (
    "pg_relation_size(a)", "pg_relation_size(a, b)", "pg_total_relation_size(a)", "pg_table_size(a)",
    "pg_indexes_size(a)", "pg_database_size(a)",
)  # fmt: skip
# An alias inside of one is a word that no client uses: it would catch the client's own column.
_MACROS = {
    # First those that others call.
    "last_name(a)": "replace(regexp_replace(a, '^(\"[^\"]*\"|[^\".]*)\\.', ''), '\"', '')",
    **dict.fromkeys(_NULLS, "CAST(NULL AS VARCHAR)"),
    **dict.fromkeys(_TRUE, "true"),
    **dict.fromkeys(_SIZES, "CAST(NULL AS BIGINT)"),
    **{
        f"has_{what}_privilege({names})": f"contains(upper({names[-1]}), '{right}')"
        for what, right in (("table", "SELECT"), ("any_column", "SELECT"), ("schema", "USAGE"), ("database", "CONNECT"))
        for names in ("a, b", "a, b, c")
    },
    "has_column_privilege(a, b, c)": "contains(upper(c), 'SELECT')",
    "has_column_privilege(a, b, c, d)": "contains(upper(d), 'SELECT')",
    "format_type(a, b)": "CASE WHEN a IS NOT NULL THEN "
    "coalesce((SELECT shown FROM pg.shown_types m_ WHERE m_.oid = a), '???') END",
    "pg_get_userbyid(a)": "'streamhouse'",
    "pg_table_is_visible(a)": "coalesce((SELECT relnamespace <> 13000 FROM pg.pg_class m_ WHERE m_.oid = a), false)",
    "pg_encoding_to_char(a)": "'UTF8'",
    "pg_char_to_encoding(a)": "6",
    "pg_client_encoding()": "'UTF8'",
    "col_description(a, b)": "(SELECT description FROM pg.pg_description m_ WHERE m_.objoid = a AND m_.objsubid = b)",
    "pg_relation_is_publishable(a)": "false",
    "pg_relation_is_updatable(a, b)": "0",
    "pg_tablespace_location(a)": "''",
    "array_to_string(a, b)": "list_aggregate(a, 'string_agg', b)",
    "array_remove(a, b)": "list_filter(a, lambda v: v IS DISTINCT FROM b)",
    "pg_is_in_recovery()": "false",
    "pg_is_other_temp_schema(a)": "false",
    "pg_my_temp_schema()": "0",
    "pg_size_pretty(a)": "format_bytes(a)",
    "array_upper(a, b)": "nullif(len(a), 0)",
    "array_lower(a, b)": "CASE WHEN len(a) > 0 THEN 1 END",
    "quote_ident(a)": "CASE WHEN regexp_full_match(a, '[a-z_][a-z0-9_]*') THEN a "
    "ELSE '\"' || replace(a, '\"', '\"\"') || '\"' END",
    "quote_literal(a)": "'''' || replace(a, '''', '''''') || ''''",
    "to_regclass(a)": "(SELECT m_.oid FROM pg.pg_class m_ WHERE m_.relname = pg.last_name(a) "
    "ORDER BY relnamespace DESC LIMIT 1)",
    "to_regtype(a)": "(SELECT m_.oid FROM pg.pg_type m_ WHERE m_.typname = pg.last_name(a) OR m_.oid = "
    "(SELECT w_.oid FROM pg.shown_types w_ WHERE w_.shown = a) LIMIT 1)",
    "regclass_of(a)": "CASE WHEN regexp_full_match(a, '[0-9]+') THEN try_cast(a AS UINTEGER) "
    "ELSE pg.to_regclass(a) END",
    "regclass_name(a)": "coalesce((SELECT relname FROM pg.pg_class m_ WHERE m_.oid = a), CAST(a AS VARCHAR))",
    "regnamespace_of(a)": "(SELECT m_.oid FROM pg.pg_namespace m_ WHERE m_.nspname = pg.last_name(a))",
    "regnamespace_name(a)": "coalesce((SELECT nspname FROM pg.pg_namespace m_ WHERE m_.oid = a), CAST(a AS VARCHAR))",
    "_pg_expandarray(a)": "unnest(list_transform(a, lambda v, i: struct_pack(x := v, n := i)))",
}
_NAMES = {signature.partition("(")[0] for signature in _MACROS}
# Tables that macros read: any of them may be called.
MACRO_TABLES = [("pg_catalog", name) for name in ("pg_class", "pg_description", "pg_type", "pg_namespace")]
# Functions whose answer depends on the session alone.
_OF_SESSION = {
    "current_setting", "set_config", "pg_backend_pid", "current_database", "current_schema", "current_schemas",
    "version", "current_user", "session_user", "user", "current_role", "current_catalog",
}  # fmt: skip
# A function of PostgreSQL that is a table here.
_KEYWORDS = ("pg_catalog", "pg_get_keywords")
_SYSTEM_COLUMNS = {"tableoid", "xmin", "xmax", "cmin", "cmax"}
_TABLE_FUNCTIONS = {"generate_series", "unnest", _KEYWORDS[1]}
# sqlglot does not know arrays of these types.
_ARRAY_OF = re.compile(r"::\s*(?:pg_catalog\.)?(oid|name|xid)\s*\[\s*\]", re.IGNORECASE)
_TYPES = {
    "oid_array": "UINTEGER[]",
    "xid_array": "UINTEGER[]",
    "name_array": "VARCHAR[]",
    "oid": "UINTEGER", "xid": "UINTEGER", "name": "VARCHAR", "char": "VARCHAR", "text": "VARCHAR",
    "varchar": "VARCHAR", "cstring": "VARCHAR", "int2": "SMALLINT", "int4": "INTEGER", "int8": "BIGINT",
    "bool": "BOOLEAN", "float4": "FLOAT", "float8": "DOUBLE", "json": "JSON", "jsonb": "JSON",
    "int2vector": "SMALLINT[]", "oidvector": "UINTEGER[]", 
    "regoper": "VARCHAR", "timestamptz": "TIMESTAMPTZ", "pg_node_tree": "VARCHAR",
    "aclitem": "VARCHAR", "information_schema.sql_identifier": "VARCHAR",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueQuery:
    """A query of the catalogue. `tables`: schema and name of those it reads. `settings`: (name, value, is_local) that
    it sets by set_config()."""

    tree: exp.Query
    tables: frozenset[tuple[str, str]] = frozenset()
    settings: tuple[tuple[str, str | None, bool], ...] = ()
    session_tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def macros() -> list[str]:
    """Returns the statements that make PostgreSQL's functions."""
    found: dict[str, list[str]] = {}
    for signature, body in _MACROS.items():
        name, _, parameters = signature.partition("(")
        found.setdefault(name, []).append(f"({parameters} AS {body}")
    return [f"CREATE MACRO {SCHEMA}.{name}{', '.join(bodies)}" for name, bodies in found.items()]


def query_of(text: str, session: Session, process_id: int, topics: Collection[str]) -> CatalogueQuery | None:
    """Returns the query of the catalogue that `text` is, None for any other statement. Raises PgError for one that is
    not supported."""
    if not _MAYBE.search(text):
        return None
    try:
        trees = sqlglot.parse(_ARRAY_OF.sub(r"::\1_array", text), dialect="postgres")
    except (SqlglotError, RecursionError):
        return None  # the SQL service says the error
    tree = trees[0] if len(trees) == 1 else None
    if not isinstance(tree, exp.Query):
        return None
    tables, others = _tables(tree, topics)
    if not tables and (others or not _calls_ours(tree)):
        return None
    if others:
        raise PgError("0A000", f"a query reads topics or the catalogue, not both: {others[0]} is not of the catalogue")
    _check(tree)
    settings: list[tuple[str, str | None, bool]] = []
    _name_columns(tree)
    rewrite = _Rewriter(session, process_id, settings)
    # Inner nodes come before their parents, which may be put into another node.
    for node in reversed(list(tree.walk(bfs=False))):
        if (changed := rewrite(node)) is not node:
            node.replace(changed)
    return CatalogueQuery(tree=tree, tables=frozenset(tables), settings=tuple(settings))


def _name_columns(tree: exp.Query) -> None:
    """Gives columns the names that PostgreSQL gives them: clients look for them by name."""
    for select in tree.find_all(exp.Select):
        for column in list(select.expressions):
            if not isinstance(column, exp.Alias | exp.Column | exp.Star):
                column.replace(exp.alias_(column.copy(), _column_name(column), quoted=True))


def _column_name(node: exp.Expr) -> str:
    if isinstance(node, exp.Alias):
        return node.alias
    if isinstance(node, exp.Subquery):
        return _column_name(node.this.selects[0]) if node.this.selects else _UNNAMED
    if isinstance(node, exp.Paren):
        return _column_name(node.this)
    if isinstance(node, exp.Cast):
        inner = _column_name(node.this)
        return inner if inner != _UNNAMED else (_type_name(node.to) or node.to.sql("postgres").lower())
    if isinstance(node, exp.Dot):
        return _column_name(node.expression)
    if isinstance(node, exp.Column | exp.Identifier):
        return node.name
    if isinstance(node, exp.Case | exp.Exists):
        return node.key
    if isinstance(node, exp.Func) and not isinstance(node, exp.Binary):
        return _function_name(node) or node.sql_name().lower()
    return _UNNAMED


_UNNAMED = "?column?"


def _tables(tree: exp.Query, topics: Collection[str]) -> tuple[set[tuple[str, str]], list[str]]:
    """Returns the tables of the catalogue that a query names, and the others."""
    ctes = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    found: set[tuple[str, str]] = set()
    others = []
    for table in tree.find_all(exp.Table):
        if not isinstance(table.this, exp.Identifier):
            if table.this.name.lower() == _KEYWORDS[1]:
                found.add(_KEYWORDS)
            continue
        schema, name = table.db.lower(), table.name.lower()
        if not schema and name in ctes:
            continue
        if schema in ("pg_catalog", "information_schema"):
            if (schema, name) not in SHAPES:
                raise PgError("42P01", f'relation "{schema}.{name}" does not exist')
            found.add((schema, name))
        elif not schema and ("pg_catalog", name) in SHAPES:
            found.add(("pg_catalog", name))
        else:
            others.append(table.name)
    return found, others


def _calls_ours(tree: exp.Query) -> bool:
    for node in tree.walk():
        if isinstance(node, exp.Column) and not node.table and not node.this.quoted:
            if node.name.lower() in ("user", "current_role"):
                return True
        elif isinstance(node, exp.Cast):
            if _type_name(node.to).startswith("reg"):
                return True
        elif isinstance(node, exp.Func) and _function_name(node) in _NAMES | _OF_SESSION:
            return True
    return False


def _function_name(node: exp.Expr) -> str:
    if isinstance(node, exp.Anonymous):
        return str(node.name).lower()
    return _FUNCTIONS.get(type(node), "")


_FUNCTIONS: dict[type[exp.Expr], str] = {
    exp.CurrentUser: "current_user",
    exp.SessionUser: "session_user",
    exp.CurrentDatabase: "current_database",
    exp.CurrentCatalog: "current_catalog",
    exp.CurrentVersion: "version",
    exp.CurrentSchema: "current_schema",
    exp.CurrentSchemas: "current_schemas",
    exp.ArrayToString: "array_to_string",
}


def _check(tree: exp.Query) -> None:
    for node in tree.walk():
        if isinstance(node, exp.Command | exp.DDL | exp.DML) and not isinstance(node, exp.Query):
            raise PgError("0A000", f"{node.key.upper()} is not supported inside a query")
        if isinstance(node, exp.Into | exp.Pivot):
            raise PgError("0A000", f"{node.key.upper()} is not supported")
        if isinstance(node, exp.Table) and not isinstance(node.this, exp.Identifier):
            function = node.this.expression if isinstance(node.this, exp.Dot) else node.this
            name = function.name if isinstance(function, exp.Anonymous) else function.sql_name()
            if name.lower() not in _TABLE_FUNCTIONS and not isinstance(
                function, exp.GenerateSeries | exp.Unnest | exp.Explode
            ):
                raise PgError("0A000", f"the table function {name.lower()} is not supported")


def _type_name(kind: exp.Expr | None) -> str:
    """Returns the name of a type that only PostgreSQL has, without its schema; "" for others."""
    if isinstance(kind, exp.ObjectIdentifier):
        return str(kind.this).lower()
    if not isinstance(kind, exp.DataType):
        return ""
    inner = kind.args.get("kind")
    if kind.this == exp.DataType.Type.USERDEFINED and inner is not None:
        name = inner.expression.name if isinstance(inner, exp.Dot) else getattr(inner, "name", str(inner))
        return str(name).lower()
    return "name" if kind.this == exp.DataType.Type.NAME else ""


class _Rewriter:
    """Turns a node of PostgreSQL's dialect into one that DuckDB takes."""

    def __init__(self, session: Session, process_id: int, settings: list[tuple[str, str | None, bool]]) -> None:
        self._session = session
        self._process_id = process_id
        self._settings = settings

    def __call__(self, node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Table):
            return self._table(node) if isinstance(node.this, exp.Identifier) else self._table_function(node)
        if isinstance(node, exp.Parameter):
            return exp.Placeholder(this=node.name)
        if isinstance(node, exp.Collate):
            inside: exp.Expr = node.this
            return inside
        if isinstance(node, exp.Operator):
            return self._operator(node)
        if isinstance(node, exp.Cast):
            return self._cast(node)
        if isinstance(node, exp.DataType | exp.ObjectIdentifier):
            name = _type_name(node)
            return exp.DataType.build(_TYPES[name], dialect="duckdb") if name in _TYPES else node
        if isinstance(node, exp.Dot) and isinstance(node.this, exp.Identifier):
            is_schema = node.this.name.lower() in ("pg_catalog", "information_schema")
            called: exp.Expr = node.expression
            return called if is_schema and not isinstance(called, exp.Identifier) else node
        if isinstance(node, exp.Column) and node.name.lower() in _SYSTEM_COLUMNS:
            return exp.cast(exp.Literal.number(0), "UINTEGER", dialect="duckdb")
        if isinstance(node, exp.Column) and not node.table and not node.this.quoted:
            if node.name.lower() in ("user", "current_role"):
                return exp.Literal.string(self._session.user)
            return node
        return self._function(node) if isinstance(node, exp.Func) else node

    def _table(self, table: exp.Table) -> exp.Expr:
        schema, name = table.db.lower(), table.name.lower()
        place = (schema or "pg_catalog", name)
        if place not in SHAPES:
            return table  # a CTE
        if table.args.get("alias") is None:
            table.set("alias", exp.TableAlias(this=exp.to_identifier(name)))
        table.set("this", exp.to_identifier(table_name(place)))
        table.set("db", exp.to_identifier(SCHEMA))
        table.set("catalog", None)
        return table

    def _table_function(self, table: exp.Table) -> exp.Expr:
        table.set("db", None)  # pg_catalog
        if isinstance(table.this, exp.Explode):
            table.set("this", exp.Anonymous(this="unnest", expressions=[table.this.this.copy()]))
        elif table.this.name.lower() == _KEYWORDS[1]:
            table.set("this", exp.to_identifier(table_name(_KEYWORDS)))
            table.set("db", exp.to_identifier(SCHEMA))
        return table

    def _operator(self, node: exp.Operator) -> exp.Expr:
        operator = str(node.args["operator"]).rpartition(".")[2].strip()
        left, right = node.this, node.expression
        build: Callable[[], exp.Expr] | None = {
            "=": lambda: exp.EQ(this=left, expression=right),
            "<>": lambda: exp.NEQ(this=left, expression=right),
            "~": lambda: exp.RegexpLike(this=left, expression=right),
            "!~": lambda: exp.Not(this=exp.RegexpLike(this=left, expression=right)),
            "~*": lambda: exp.RegexpILike(this=left, expression=right),
            "~~": lambda: exp.Like(this=left, expression=right),
            "!~~": lambda: exp.Not(this=exp.Like(this=left, expression=right)),
        }.get(operator)
        if build is None:
            raise PgError("0A000", f"the operator {operator} is not supported")
        return build()

    def _cast(self, node: exp.Cast) -> exp.Expr:
        name = _type_name(node.to)
        is_array = isinstance(node.to, exp.DataType) and node.to.sql("duckdb").endswith("[]")
        if is_array and isinstance(node.this, exp.Literal) and node.this.is_string:
            return _array(node)
        if name not in ("regclass", "regtype", "regnamespace", "regproc", "regprocedure", "regrole"):
            return node
        value = node.this
        is_text = (isinstance(value, exp.Literal) and value.is_string) or isinstance(
            value, exp.Placeholder | exp.Parameter
        )
        if name in ("regproc", "regprocedure"):
            return _call("last_name", value) if is_text else exp.cast(value, "VARCHAR")
        if name == "regrole":
            return exp.cast(value, "VARCHAR") if is_text else _call("pg_get_userbyid", value)
        if name == "regtype":
            return _call("to_regtype", value) if is_text else _call("format_type", value, exp.null())
        return _call(f"{name}_of" if is_text else f"{name}_name", value)

    def _function(self, node: exp.Func) -> exp.Expr:
        name = _function_name(node)
        if name in _NAMES:
            arguments = [node.this, node.expression] if isinstance(node, exp.ArrayToString) else node.expressions
            return _call(name, *arguments)
        session = self._session
        match name:
            case "current_user" | "session_user" | "user" | "current_role":
                return exp.Literal.string(session.user)
            case "current_database" | "current_catalog":
                return exp.Literal.string(DATABASE)
            case "version":
                return exp.Literal.string(VERSION)
            case "current_schema":
                return exp.Literal.string("public")
            case "current_schemas":
                argument = node.expressions[0] if isinstance(node, exp.Anonymous) and node.expressions else node.this
                with_implicit = isinstance(argument, exp.Boolean) and bool(argument.this)
                names = ["pg_catalog", "public"] if with_implicit else ["public"]
                return exp.Array(expressions=[exp.Literal.string(found) for found in names])
            case "pg_backend_pid":
                return exp.Literal.number(self._process_id)
            case "current_setting":
                return self._current_setting(node)
            case "set_config":
                return self._set_config(node)
        return node

    def _current_setting(self, node: exp.Expr) -> exp.Expr:
        arguments = node.expressions
        if not arguments:
            raise PgError("42883", "current_setting() takes the name of a setting")
        if not (isinstance(arguments[0], exp.Literal) and arguments[0].is_string):
            case = exp.Case(this=arguments[0].copy())
            for name, value in self._session.all().items():
                case = case.when(exp.Literal.string(name), exp.Literal.string(value))
            return case
        try:
            return exp.Literal.string(self._session.get(arguments[0].name))
        except PgError:
            if len(arguments) > 1 and arguments[1].sql().upper() == "TRUE":
                return exp.cast(exp.null(), "VARCHAR")
            raise

    def _set_config(self, node: exp.Expr) -> exp.Expr:
        arguments = node.expressions
        texts = [item for item in arguments[:2] if isinstance(item, exp.Literal)]
        if len(arguments) != 3 or len(texts) != 2 or not isinstance(arguments[2], exp.Boolean):
            raise PgError("0A000", "set_config() takes name, value and true or false, without parameters")
        self._settings.append((texts[0].name.lower(), texts[1].name, bool(arguments[2].this)))
        return exp.Literal.string(texts[1].name)


def over_session_tables(tree: exp.Query, names: Collection[str]) -> exp.Query:
    """Returns the tree with the tables of these names replaced by a session's own, `session_name`. Changes the tree."""
    for table in tree.find_all(exp.Table):
        if table.db == SCHEMA and table.name in names:
            table.set("this", exp.to_identifier(f"session_{table.name}"))
            table.set("db", None)
    return tree


def table_name(place: tuple[str, str]) -> str:
    """Returns the name of a table in DuckDB, given schema and name."""
    schema, name = place
    return name if schema == "pg_catalog" else f"information_{name}"


def _array(node: exp.Cast) -> exp.Expr:
    """Returns the cast of `'{a,b}'` to an array, with the array in DuckDB's form."""
    try:
        items = array_of_text(node.this.name, TEXT)
    except ValueError as error:
        raise PgError("22P02", f"malformed array literal: {node.this.name!r}", detail=str(error)) from None
    values = [exp.null() if item is None else exp.Literal.string(str(item)) for item in items]
    node.set("this", exp.Array(expressions=values))
    return node


def _call(name: str, *arguments: exp.Expr) -> exp.Expr:
    function = exp.Anonymous(this=name, expressions=[argument.copy() for argument in arguments])
    return exp.Dot(this=exp.to_identifier(SCHEMA), expression=function)
