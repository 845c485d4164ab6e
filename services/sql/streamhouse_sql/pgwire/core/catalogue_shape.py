"""Columns of PostgreSQL's catalogue, and its types: the shape that clients ask for. Pure data.

Tables and columns are those of PostgreSQL 17, and those of 15 that were renamed since.
"""

# Name, OID, kind (r table, v view, f function), and columns with their types, a table a line.
TABLES = """
pg_catalog.pg_aggregate 2600 r aggfnoid:text aggkind:text aggnumdirectargs:int2 aggtransfn:text aggfinalfn:text
  aggcombinefn:text aggserialfn:text aggdeserialfn:text aggmtransfn:text aggminvtransfn:text aggmfinalfn:text
  aggfinalextra:bool aggmfinalextra:bool aggfinalmodify:text aggmfinalmodify:text aggsortop:oid aggtranstype:oid
  aggtransspace:int4 aggmtranstype:oid aggmtransspace:int4 agginitval:text aggminitval:text
pg_catalog.pg_am 2601 r oid:oid amname:text amhandler:text amtype:text
pg_catalog.pg_attrdef 2604 r oid:oid adrelid:oid adnum:int2 adbin:text
pg_catalog.pg_attribute 1249 r attrelid:oid attname:text atttypid:oid attlen:int2 attnum:int2 attcacheoff:int4
  atttypmod:int4 attndims:int2 attbyval:bool attalign:text attstorage:text attcompression:text attnotnull:bool
  atthasdef:bool atthasmissing:bool attidentity:text attgenerated:text attisdropped:bool attislocal:bool
  attinhcount:int2 attcollation:oid attstattarget:int2 attacl:text[] attoptions:text[] attfdwoptions:text[]
  attmissingval:text
pg_catalog.pg_auth_members 1261 r oid:oid roleid:oid member:oid grantor:oid admin_option:bool inherit_option:bool
  set_option:bool
pg_catalog.pg_available_extensions 12081 v name:text default_version:text installed_version:text comment:text
pg_catalog.pg_cast 2605 r oid:oid castsource:oid casttarget:oid castfunc:oid castcontext:text castmethod:text
pg_catalog.pg_class 1259 r oid:oid relname:text relnamespace:oid reltype:oid reloftype:oid relowner:oid relam:oid
  relfilenode:oid reltablespace:oid relpages:int4 reltuples:float4 relallvisible:int4 reltoastrelid:oid
  relhasindex:bool relisshared:bool relpersistence:text relkind:text relnatts:int2 relchecks:int2 relhasrules:bool
  relhastriggers:bool relhassubclass:bool relrowsecurity:bool relforcerowsecurity:bool relispopulated:bool
  relreplident:text relispartition:bool relrewrite:oid relfrozenxid:oid relminmxid:oid relacl:text[] reloptions:text[]
  relpartbound:text
pg_catalog.pg_collation 3456 r oid:oid collname:text collnamespace:oid collowner:oid collprovider:text
  collisdeterministic:bool collencoding:int4 collcollate:text collctype:text colllocale:text collicurules:text
  collversion:text colliculocale:text
pg_catalog.pg_constraint 2606 r oid:oid conname:text connamespace:oid contype:text condeferrable:bool condeferred:bool
  convalidated:bool conrelid:oid contypid:oid conindid:oid conparentid:oid confrelid:oid confupdtype:text
  confdeltype:text confmatchtype:text conislocal:bool coninhcount:int2 connoinherit:bool conkey:int2[] confkey:int2[]
  conpfeqop:oid[] conppeqop:oid[] conffeqop:oid[] confdelsetcols:int2[] conexclop:oid[] conbin:text
pg_catalog.pg_conversion 2607 r oid:oid conname:text connamespace:oid conowner:oid conforencoding:int4
  contoencoding:int4 conproc:text condefault:bool
pg_catalog.pg_cursors 12077 v name:text statement:text is_holdable:bool is_binary:bool is_scrollable:bool
  creation_time:timestamptz
pg_catalog.pg_database 1262 r oid:oid datname:text datdba:oid encoding:int4 datlocprovider:text datistemplate:bool
  datallowconn:bool dathasloginevt:bool datconnlimit:int4 datfrozenxid:oid datminmxid:oid dattablespace:oid
  datcollate:text datctype:text datlocale:text daticurules:text datcollversion:text datacl:text[] daticulocale:text
pg_catalog.pg_depend 2608 r classid:oid objid:oid objsubid:int4 refclassid:oid refobjid:oid refobjsubid:int4
  deptype:text
pg_catalog.pg_description 2609 r objoid:oid classoid:oid objsubid:int4 description:text
pg_catalog.pg_enum 3501 r oid:oid enumtypid:oid enumsortorder:float4 enumlabel:text
pg_catalog.pg_event_trigger 3466 r oid:oid evtname:text evtevent:text evtowner:oid evtfoid:oid evtenabled:text
  evttags:text[]
pg_catalog.pg_extension 3079 r oid:oid extname:text extowner:oid extnamespace:oid extrelocatable:bool extversion:text
  extconfig:oid[] extcondition:text[]
pg_catalog.pg_foreign_data_wrapper 2328 r oid:oid fdwname:text fdwowner:oid fdwhandler:oid fdwvalidator:oid
  fdwacl:text[] fdwoptions:text[]
pg_catalog.pg_foreign_server 1417 r oid:oid srvname:text srvowner:oid srvfdw:oid srvtype:text srvversion:text
  srvacl:text[] srvoptions:text[]
pg_catalog.pg_foreign_table 3118 r ftrelid:oid ftserver:oid ftoptions:text[]
pg_catalog.pg_index 2610 r indexrelid:oid indrelid:oid indnatts:int2 indnkeyatts:int2 indisunique:bool
  indnullsnotdistinct:bool indisprimary:bool indisexclusion:bool indimmediate:bool indisclustered:bool indisvalid:bool
  indcheckxmin:bool indisready:bool indislive:bool indisreplident:bool indkey:int2[] indcollation:oid[] indclass:oid[]
  indoption:int2[] indexprs:text indpred:text
pg_catalog.pg_indexes 12043 v schemaname:text tablename:text indexname:text tablespace:text indexdef:text
pg_catalog.pg_inherits 2611 r inhrelid:oid inhparent:oid inhseqno:int4 inhdetachpending:bool
pg_catalog.pg_language 2612 r oid:oid lanname:text lanowner:oid lanispl:bool lanpltrusted:bool lanplcallfoid:oid
  laninline:oid lanvalidator:oid lanacl:text[]
pg_catalog.pg_locks 12073 v locktype:text database:oid relation:oid page:int4 tuple:int2 virtualxid:text
  transactionid:oid classid:oid objid:oid objsubid:int2 virtualtransaction:text pid:int4 mode:text granted:bool
  fastpath:bool waitstart:timestamptz
pg_catalog.pg_matviews 12038 v schemaname:text matviewname:text matviewowner:text tablespace:text hasindexes:bool
  ispopulated:bool definition:text
pg_catalog.pg_namespace 2615 r oid:oid nspname:text nspowner:oid nspacl:text[]
pg_catalog.pg_opclass 2616 r oid:oid opcmethod:oid opcname:text opcnamespace:oid opcowner:oid opcfamily:oid
  opcintype:oid opcdefault:bool opckeytype:oid
pg_catalog.pg_operator 2617 r oid:oid oprname:text oprnamespace:oid oprowner:oid oprkind:text oprcanmerge:bool
  oprcanhash:bool oprleft:oid oprright:oid oprresult:oid oprcom:oid oprnegate:oid oprcode:text oprrest:text
  oprjoin:text
pg_catalog.pg_partitioned_table 3350 r partrelid:oid partstrat:text partnatts:int2 partdefid:oid partattrs:int2[]
  partclass:oid[] partcollation:oid[] partexprs:text
pg_catalog.pg_policy 3256 r oid:oid polname:text polrelid:oid polcmd:text polpermissive:bool polroles:oid[]
  polqual:text polwithcheck:text
pg_catalog.pg_prepared_statements 12095 v name:text statement:text prepare_time:timestamptz parameter_types:oid[]
  result_types:oid[] from_sql:bool generic_plans:int8 custom_plans:int8
pg_catalog.pg_proc 1255 r oid:oid proname:text pronamespace:oid proowner:oid prolang:oid procost:float4 prorows:float4
  provariadic:oid prosupport:text prokind:text prosecdef:bool proleakproof:bool proisstrict:bool proretset:bool
  provolatile:text proparallel:text pronargs:int2 pronargdefaults:int2 prorettype:oid proargtypes:oid[]
  proallargtypes:oid[] proargmodes:text[] proargnames:text[] proargdefaults:text protrftypes:oid[] prosrc:text
  probin:text prosqlbody:text proconfig:text[] proacl:text[]
pg_catalog.pg_publication 6104 r oid:oid pubname:text pubowner:oid puballtables:bool pubinsert:bool pubupdate:bool
  pubdelete:bool pubtruncate:bool pubviaroot:bool
pg_catalog.pg_publication_namespace 6237 r oid:oid pnpubid:oid pnnspid:oid
pg_catalog.pg_publication_rel 6106 r oid:oid prpubid:oid prrelid:oid prqual:text prattrs:int2[]
pg_catalog.pg_publication_tables 12068 v pubname:text schemaname:text tablename:text attnames:text[] rowfilter:text
pg_catalog.pg_range 3541 r rngtypid:oid rngsubtype:oid rngmultitypid:oid rngcollation:oid rngsubopc:oid
  rngcanonical:text rngsubdiff:text
pg_catalog.pg_rewrite 2618 r oid:oid rulename:text ev_class:oid ev_type:text ev_enabled:text is_instead:bool
  ev_qual:text ev_action:text
pg_catalog.pg_roles 12000 v rolname:text rolsuper:bool rolinherit:bool rolcreaterole:bool rolcreatedb:bool
  rolcanlogin:bool rolreplication:bool rolconnlimit:int4 rolpassword:text rolvaliduntil:timestamptz rolbypassrls:bool
  rolconfig:text[] oid:oid
pg_catalog.pg_rules 12023 v schemaname:text tablename:text rulename:text definition:text
pg_catalog.pg_seclabel 3596 r objoid:oid classoid:oid objsubid:int4 provider:text label:text
pg_catalog.pg_sequence 2224 r seqrelid:oid seqtypid:oid seqstart:int8 seqincrement:int8 seqmax:int8 seqmin:int8
  seqcache:int8 seqcycle:bool
pg_catalog.pg_sequences 12048 v schemaname:text sequencename:text sequenceowner:text data_type:oid start_value:int8
  min_value:int8 max_value:int8 increment_by:int8 cycle:bool cache_size:int8 last_value:int8
pg_catalog.pg_settings 12104 v name:text setting:text unit:text category:text short_desc:text extra_desc:text
  context:text vartype:text source:text min_val:text max_val:text enumvals:text[] boot_val:text reset_val:text
  sourcefile:text sourceline:int4 pending_restart:bool
pg_catalog.pg_shdepend 1214 r dbid:oid classid:oid objid:oid objsubid:int4 refclassid:oid refobjid:oid deptype:text
pg_catalog.pg_shdescription 2396 r objoid:oid classoid:oid description:text
pg_catalog.pg_stat_activity 12222 v datid:oid datname:text pid:int4 leader_pid:int4 usesysid:oid usename:text
  application_name:text client_addr:text client_hostname:text client_port:int4 backend_start:timestamptz
  xact_start:timestamptz query_start:timestamptz state_change:timestamptz wait_event_type:text wait_event:text
  state:text backend_xid:oid backend_xmin:oid query_id:int8 query:text backend_type:text
pg_catalog.pg_stat_all_tables 12142 v relid:oid schemaname:text relname:text seq_scan:int8 last_seq_scan:timestamptz
  seq_tup_read:int8 idx_scan:int8 last_idx_scan:timestamptz idx_tup_fetch:int8 n_tup_ins:int8 n_tup_upd:int8
  n_tup_del:int8 n_tup_hot_upd:int8 n_tup_newpage_upd:int8 n_live_tup:int8 n_dead_tup:int8 n_mod_since_analyze:int8
  n_ins_since_vacuum:int8 last_vacuum:timestamptz last_autovacuum:timestamptz last_analyze:timestamptz
  last_autoanalyze:timestamptz vacuum_count:int8 autovacuum_count:int8 analyze_count:int8 autoanalyze_count:int8
pg_catalog.pg_stat_database 12266 v datid:oid datname:text numbackends:int4 xact_commit:int8 xact_rollback:int8
  blks_read:int8 blks_hit:int8 tup_returned:int8 tup_fetched:int8 tup_inserted:int8 tup_updated:int8 tup_deleted:int8
  conflicts:int8 temp_files:int8 temp_bytes:int8 deadlocks:int8 checksum_failures:int8
  checksum_last_failure:timestamptz blk_read_time:float8 blk_write_time:float8 session_time:float8 active_time:float8
  idle_in_transaction_time:float8 sessions:int8 sessions_abandoned:int8 sessions_fatal:int8 sessions_killed:int8
  stats_reset:timestamptz
pg_catalog.pg_stat_user_tables 12161 v relid:oid schemaname:text relname:text seq_scan:int8 last_seq_scan:timestamptz
  seq_tup_read:int8 idx_scan:int8 last_idx_scan:timestamptz idx_tup_fetch:int8 n_tup_ins:int8 n_tup_upd:int8
  n_tup_del:int8 n_tup_hot_upd:int8 n_tup_newpage_upd:int8 n_live_tup:int8 n_dead_tup:int8 n_mod_since_analyze:int8
  n_ins_since_vacuum:int8 last_vacuum:timestamptz last_autovacuum:timestamptz last_analyze:timestamptz
  last_autoanalyze:timestamptz vacuum_count:int8 autovacuum_count:int8 analyze_count:int8 autoanalyze_count:int8
pg_catalog.pg_stat_user_indexes 12192 v relid:oid indexrelid:oid schemaname:text relname:text indexrelname:text
  idx_scan:int8 last_idx_scan:timestamptz idx_tup_read:int8 idx_tup_fetch:int8
pg_catalog.pg_statio_user_tables 12179 v relid:oid schemaname:text relname:text heap_blks_read:int8 heap_blks_hit:int8
  idx_blks_read:int8 idx_blks_hit:int8 toast_blks_read:int8 toast_blks_hit:int8 tidx_blks_read:int8 tidx_blks_hit:int8
pg_catalog.pg_statistic_ext 3381 r oid:oid stxrelid:oid stxname:text stxnamespace:oid stxowner:oid stxkeys:int2[]
  stxstattarget:int2 stxkind:text[] stxexprs:text
pg_catalog.pg_subscription 6100 r oid:oid subdbid:oid subskiplsn:text subname:text subowner:oid subenabled:bool
  subbinary:bool substream:text subtwophasestate:text subdisableonerr:bool subpasswordrequired:bool subrunasowner:bool
  subfailover:bool subconninfo:text subslotname:text subsynccommit:text subpublications:text[] suborigin:text
pg_catalog.pg_tables 12033 v schemaname:text tablename:text tableowner:text tablespace:text hasindexes:bool
  hasrules:bool hastriggers:bool rowsecurity:bool
pg_catalog.pg_tablespace 1213 r oid:oid spcname:text spcowner:oid spcacl:text[] spcoptions:text[]
pg_catalog.pg_timezone_abbrevs 12122 v abbrev:text utc_offset:interval is_dst:bool
pg_catalog.pg_timezone_names 12126 v name:text abbrev:text utc_offset:interval is_dst:bool
pg_catalog.pg_trigger 2620 r oid:oid tgrelid:oid tgparentid:oid tgname:text tgfoid:oid tgtype:int2 tgenabled:text
  tgisinternal:bool tgconstrrelid:oid tgconstrindid:oid tgconstraint:oid tgdeferrable:bool tginitdeferred:bool
  tgnargs:int2 tgattr:int2[] tgargs:bytea tgqual:text tgoldtable:text tgnewtable:text
pg_catalog.pg_type 1247 r oid:oid typname:text typnamespace:oid typowner:oid typlen:int2 typbyval:bool typtype:text
  typcategory:text typispreferred:bool typisdefined:bool typdelim:text typrelid:oid typsubscript:text typelem:oid
  typarray:oid typinput:text typoutput:text typreceive:text typsend:text typmodin:text typmodout:text typanalyze:text
  typalign:text typstorage:text typnotnull:bool typbasetype:oid typtypmod:int4 typndims:int4 typcollation:oid
  typdefaultbin:text typdefault:text typacl:text[]
pg_catalog.pg_user 12014 v usename:text usesysid:oid usecreatedb:bool usesuper:bool userepl:bool usebypassrls:bool
  passwd:text valuntil:timestamptz useconfig:text[]
pg_catalog.pg_user_mappings 12334 v umid:oid srvid:oid srvname:text umuser:oid usename:text umoptions:text[]
pg_catalog.pg_views 12028 v schemaname:text viewname:text viewowner:text definition:text
pg_catalog.pg_db_role_setting 2964 r setdatabase:oid setrole:oid setconfig:text[]
pg_catalog.pg_ts_config 3602 r oid:oid cfgname:text cfgnamespace:oid cfgowner:oid cfgparser:oid
pg_catalog.pg_ts_dict 3600 r oid:oid dictname:text dictnamespace:oid dictowner:oid dicttemplate:oid
  dictinitoption:text
pg_catalog.pg_ts_parser 3601 r oid:oid prsname:text prsnamespace:oid prsstart:text prstoken:text prsend:text
  prsheadline:text prslextype:text
pg_catalog.pg_ts_template 3764 r oid:oid tmplname:text tmplnamespace:oid tmplinit:text tmpllexize:text
pg_catalog.pg_opfamily 2753 r oid:oid opfmethod:oid opfname:text opfnamespace:oid opfowner:oid
pg_catalog.pg_amop 2602 r oid:oid amopfamily:oid amoplefttype:oid amoprighttype:oid amopstrategy:int2 amoppurpose:text
  amopopr:oid amopmethod:oid amopsortfamily:oid
pg_catalog.pg_amproc 2603 r oid:oid amprocfamily:oid amproclefttype:oid amprocrighttype:oid amprocnum:int2 amproc:text
pg_catalog.pg_default_acl 826 r oid:oid defaclrole:oid defaclnamespace:oid defaclobjtype:text defaclacl:text[]
pg_catalog.pg_transform 3576 r oid:oid trftype:oid trflang:oid trffromsql:text trftosql:text
pg_catalog.pg_user_mapping 1418 r oid:oid umuser:oid umserver:oid umoptions:text[]
pg_catalog.pg_policies 12018 v schemaname:text tablename:text policyname:text permissive:text roles:text[] cmd:text
  qual:text with_check:text
pg_catalog.pg_group 12010 v groname:text grosysid:oid grolist:oid[]
pg_catalog.pg_stat_replication 12227 v pid:int4 usesysid:oid usename:text application_name:text client_addr:text
  client_hostname:text client_port:int4 backend_start:timestamptz backend_xmin:oid state:text sent_lsn:text
  write_lsn:text flush_lsn:text replay_lsn:text write_lag:interval flush_lag:interval replay_lag:interval
  sync_priority:int4 sync_state:text reply_time:timestamptz
pg_catalog.pg_stat_ssl 12249 v pid:int4 ssl:bool version:text cipher:text bits:int4 client_dn:text client_serial:text
  issuer_dn:text
pg_catalog.pg_stats 12053 v schemaname:text tablename:text attname:text inherited:bool null_frac:float4 avg_width:int4
  n_distinct:float4 most_common_vals:text most_common_freqs:float4[] histogram_bounds:text correlation:float4
  most_common_elems:text most_common_elem_freqs:float4[] elem_count_histogram:float4[] range_length_histogram:text
  range_empty_frac:float4 range_bounds_histogram:text
pg_catalog.pg_largeobject_metadata 2995 r oid:oid lomowner:oid lomacl:text[]
pg_catalog.pg_ts_config_map 3603 r mapcfg:oid maptokentype:int4 mapseqno:int4 mapdict:oid
pg_catalog.pg_init_privs 3394 r objoid:oid classoid:oid objsubid:int4 privtype:text initprivs:text[]
pg_catalog.pg_get_keywords 1686 f word:text catcode:text barelabel:bool catdesc:text baredesc:text
information_schema.applicable_roles 12440 v grantee:text role_name:text is_grantable:text
information_schema.character_sets 12454 v character_set_catalog:text character_set_schema:text character_set_name:text
  character_repertoire:text form_of_use:text default_collate_catalog:text default_collate_schema:text
  default_collate_name:text
information_schema.check_constraints 12464 v constraint_catalog:text constraint_schema:text constraint_name:text
  check_clause:text
information_schema.column_privileges 12489 v grantor:text grantee:text table_catalog:text table_schema:text
  table_name:text column_name:text privilege_type:text is_grantable:text
information_schema.columns 12499 v table_catalog:text table_schema:text table_name:text column_name:text
  ordinal_position:int4 column_default:text is_nullable:text data_type:text character_maximum_length:int4
  character_octet_length:int4 numeric_precision:int4 numeric_precision_radix:int4 numeric_scale:int4
  datetime_precision:int4 interval_type:text interval_precision:int4 character_set_catalog:text
  character_set_schema:text character_set_name:text collation_catalog:text collation_schema:text collation_name:text
  domain_catalog:text domain_schema:text domain_name:text udt_catalog:text udt_schema:text udt_name:text
  scope_catalog:text scope_schema:text scope_name:text maximum_cardinality:int4 dtd_identifier:text
  is_self_referencing:text is_identity:text identity_generation:text identity_start:text identity_increment:text
  identity_maximum:text identity_minimum:text identity_cycle:text is_generated:text generation_expression:text
  is_updatable:text
information_schema.constraint_column_usage 12504 v table_catalog:text table_schema:text table_name:text
  column_name:text constraint_catalog:text constraint_schema:text constraint_name:text
information_schema.constraint_table_usage 12509 v table_catalog:text table_schema:text table_name:text
  constraint_catalog:text constraint_schema:text constraint_name:text
information_schema.domains 12523 v domain_catalog:text domain_schema:text domain_name:text data_type:text
  character_maximum_length:int4 character_octet_length:int4 character_set_catalog:text character_set_schema:text
  character_set_name:text collation_catalog:text collation_schema:text collation_name:text numeric_precision:int4
  numeric_precision_radix:int4 numeric_scale:int4 datetime_precision:int4 interval_type:text interval_precision:int4
  domain_default:text udt_catalog:text udt_schema:text udt_name:text scope_catalog:text scope_schema:text
  scope_name:text maximum_cardinality:int4 dtd_identifier:text
information_schema.element_types 12696 v object_catalog:text object_schema:text object_name:text object_type:text
  collection_type_identifier:text data_type:text character_maximum_length:int4 character_octet_length:int4
  character_set_catalog:text character_set_schema:text character_set_name:text collation_catalog:text
  collation_schema:text collation_name:text numeric_precision:int4 numeric_precision_radix:int4 numeric_scale:int4
  datetime_precision:int4 interval_type:text interval_precision:int4 udt_catalog:text udt_schema:text udt_name:text
  scope_catalog:text scope_schema:text scope_name:text maximum_cardinality:int4 dtd_identifier:text
information_schema.enabled_roles 12528 v role_name:text
information_schema.information_schema_catalog_name 12431 v catalog_name:text
information_schema.key_column_usage 12532 v constraint_catalog:text constraint_schema:text constraint_name:text
  table_catalog:text table_schema:text table_name:text column_name:text ordinal_position:int4
  position_in_unique_constraint:int4
information_schema.parameters 12537 v specific_catalog:text specific_schema:text specific_name:text
  ordinal_position:int4 parameter_mode:text is_result:text as_locator:text parameter_name:text data_type:text
  character_maximum_length:int4 character_octet_length:int4 character_set_catalog:text character_set_schema:text
  character_set_name:text collation_catalog:text collation_schema:text collation_name:text numeric_precision:int4
  numeric_precision_radix:int4 numeric_scale:int4 datetime_precision:int4 interval_type:text interval_precision:int4
  udt_catalog:text udt_schema:text udt_name:text scope_catalog:text scope_schema:text scope_name:text
  maximum_cardinality:int4 dtd_identifier:text parameter_default:text
information_schema.referential_constraints 12542 v constraint_catalog:text constraint_schema:text constraint_name:text
  unique_constraint_catalog:text unique_constraint_schema:text unique_constraint_name:text match_option:text
  update_rule:text delete_rule:text
information_schema.role_table_grants 12624 v grantor:text grantee:text table_catalog:text table_schema:text
  table_name:text privilege_type:text is_grantable:text with_hierarchy:text
information_schema.routines 12580 v specific_catalog:text specific_schema:text specific_name:text routine_catalog:text
  routine_schema:text routine_name:text routine_type:text module_catalog:text module_schema:text module_name:text
  udt_catalog:text udt_schema:text udt_name:text data_type:text character_maximum_length:int4
  character_octet_length:int4 character_set_catalog:text character_set_schema:text character_set_name:text
  collation_catalog:text collation_schema:text collation_name:text numeric_precision:int4 numeric_precision_radix:int4
  numeric_scale:int4 datetime_precision:int4 interval_type:text interval_precision:int4 type_udt_catalog:text
  type_udt_schema:text type_udt_name:text scope_catalog:text scope_schema:text scope_name:text
  maximum_cardinality:int4 dtd_identifier:text routine_body:text routine_definition:text external_name:text
  external_language:text parameter_style:text is_deterministic:text sql_data_access:text is_null_call:text
  sql_path:text schema_level_routine:text max_dynamic_result_sets:int4 is_user_defined_cast:text
  is_implicitly_invocable:text security_type:text to_sql_specific_catalog:text to_sql_specific_schema:text
  to_sql_specific_name:text as_locator:text created:timestamptz last_altered:timestamptz new_savepoint_level:text
  is_udt_dependent:text result_cast_from_data_type:text result_cast_as_locator:text result_cast_char_max_length:int4
  result_cast_char_octet_length:int4 result_cast_char_set_catalog:text result_cast_char_set_schema:text
  result_cast_char_set_name:text result_cast_collation_catalog:text result_cast_collation_schema:text
  result_cast_collation_name:text result_cast_numeric_precision:int4 result_cast_numeric_precision_radix:int4
  result_cast_numeric_scale:int4 result_cast_datetime_precision:int4 result_cast_interval_type:text
  result_cast_interval_precision:int4 result_cast_type_udt_catalog:text result_cast_type_udt_schema:text
  result_cast_type_udt_name:text result_cast_scope_catalog:text result_cast_scope_schema:text
  result_cast_scope_name:text result_cast_maximum_cardinality:int4 result_cast_dtd_identifier:text
information_schema.schemata 12585 v catalog_name:text schema_name:text schema_owner:text
  default_character_set_catalog:text default_character_set_schema:text default_character_set_name:text sql_path:text
information_schema.sequences 12589 v sequence_catalog:text sequence_schema:text sequence_name:text data_type:text
  numeric_precision:int4 numeric_precision_radix:int4 numeric_scale:int4 start_value:text minimum_value:text
  maximum_value:text increment:text cycle_option:text
information_schema.table_constraints 12614 v constraint_catalog:text constraint_schema:text constraint_name:text
  table_catalog:text table_schema:text table_name:text constraint_type:text is_deferrable:text initially_deferred:text
  enforced:text nulls_distinct:text
information_schema.table_privileges 12619 v grantor:text grantee:text table_catalog:text table_schema:text
  table_name:text privilege_type:text is_grantable:text with_hierarchy:text
information_schema.tables 12628 v table_catalog:text table_schema:text table_name:text table_type:text
  self_referencing_column_name:text reference_generation:text user_defined_type_catalog:text
  user_defined_type_schema:text user_defined_type_name:text is_insertable_into:text is_typed:text commit_action:text
information_schema.triggers 12643 v trigger_catalog:text trigger_schema:text trigger_name:text event_manipulation:text
  event_object_catalog:text event_object_schema:text event_object_table:text action_order:int4 action_condition:text
  action_statement:text action_orientation:text action_timing:text action_reference_old_table:text
  action_reference_new_table:text action_reference_old_row:text action_reference_new_row:text created:timestamptz
information_schema.user_defined_types 12666 v user_defined_type_catalog:text user_defined_type_schema:text
  user_defined_type_name:text user_defined_type_category:text is_instantiable:text is_final:text ordering_form:text
  ordering_category:text ordering_routine_catalog:text ordering_routine_schema:text ordering_routine_name:text
  reference_type:text data_type:text character_maximum_length:int4 character_octet_length:int4
  character_set_catalog:text character_set_schema:text character_set_name:text collation_catalog:text
  collation_schema:text collation_name:text numeric_precision:int4 numeric_precision_radix:int4 numeric_scale:int4
  datetime_precision:int4 interval_type:text interval_precision:int4 source_dtd_identifier:text
  ref_dtd_identifier:text
information_schema.view_table_usage 12681 v view_catalog:text view_schema:text view_name:text table_catalog:text
  table_schema:text table_name:text
information_schema.views 12686 v table_catalog:text table_schema:text table_name:text view_definition:text
  check_option:text is_updatable:text is_insertable_into:text is_trigger_updatable:text is_trigger_deletable:text
  is_trigger_insertable_into:text
"""

# A type a line: OID, name, length, by value, kind, category, is preferred, element, array, input, output, receive,
# send, alignment, storage, collation, and how format_type() writes it, with _ for a blank.
TYPES = """
16 bool 1 t b B t 0 1000 boolin boolout boolrecv boolsend c p 0 boolean
17 bytea -1 f b U f 0 1001 byteain byteaout bytearecv byteasend i x 0 bytea
18 char 1 t b Z f 0 1002 charin charout charrecv charsend c p 0 "char"
19 name 64 f b S f 18 1003 namein nameout namerecv namesend c p 950 name
20 int8 8 t b N f 0 1016 int8in int8out int8recv int8send d p 0 bigint
21 int2 2 t b N f 0 1005 int2in int2out int2recv int2send s p 0 smallint
22 int2vector -1 f b A f 21 1006 int2vectorin int2vectorout int2vectorrecv int2vectorsend i p 0 int2vector
23 int4 4 t b N f 0 1007 int4in int4out int4recv int4send i p 0 integer
24 regproc 4 t b N f 0 1008 regprocin regprocout regprocrecv regprocsend i p 0 regproc
25 text -1 f b S t 0 1009 textin textout textrecv textsend i x 100 text
26 oid 4 t b N t 0 1028 oidin oidout oidrecv oidsend i p 0 oid
27 tid 6 f b U f 0 1010 tidin tidout tidrecv tidsend s p 0 tid
28 xid 4 t b U f 0 1011 xidin xidout xidrecv xidsend i p 0 xid
29 cid 4 t b U f 0 1012 cidin cidout cidrecv cidsend i p 0 cid
30 oidvector -1 f b A f 26 1013 oidvectorin oidvectorout oidvectorrecv oidvectorsend i p 0 oidvector
114 json -1 f b U f 0 199 json_in json_out json_recv json_send i x 0 json
142 xml -1 f b U f 0 143 xml_in xml_out xml_recv xml_send i x 0 xml
143 _xml -1 f b A f 142 0 array_in array_out array_recv array_send i x 0 xml[]
199 _json -1 f b A f 114 0 array_in array_out array_recv array_send i x 0 json[]
271 _xid8 -1 f b A f 5069 0 array_in array_out array_recv array_send d x 0 xid8[]
650 cidr -1 f b I f 0 651 cidr_in cidr_out cidr_recv cidr_send i m 0 cidr
651 _cidr -1 f b A f 650 0 array_in array_out array_recv array_send i x 0 cidr[]
700 float4 4 t b N f 0 1021 float4in float4out float4recv float4send i p 0 real
701 float8 8 t b N t 0 1022 float8in float8out float8recv float8send d p 0 double_precision
705 unknown -2 f p X f 0 0 unknownin unknownout unknownrecv unknownsend c p 0 unknown
790 money 8 t b N f 0 791 cash_in cash_out cash_recv cash_send d p 0 money
791 _money -1 f b A f 790 0 array_in array_out array_recv array_send d x 0 money[]
829 macaddr 6 f b U f 0 1040 macaddr_in macaddr_out macaddr_recv macaddr_send i p 0 macaddr
869 inet -1 f b I t 0 1041 inet_in inet_out inet_recv inet_send i m 0 inet
1000 _bool -1 f b A f 16 0 array_in array_out array_recv array_send i x 0 boolean[]
1001 _bytea -1 f b A f 17 0 array_in array_out array_recv array_send i x 0 bytea[]
1002 _char -1 f b A f 18 0 array_in array_out array_recv array_send i x 0 "char"[]
1003 _name -1 f b A f 19 0 array_in array_out array_recv array_send i x 950 name[]
1005 _int2 -1 f b A f 21 0 array_in array_out array_recv array_send i x 0 smallint[]
1006 _int2vector -1 f b A f 22 0 array_in array_out array_recv array_send i x 0 int2vector[]
1007 _int4 -1 f b A f 23 0 array_in array_out array_recv array_send i x 0 integer[]
1008 _regproc -1 f b A f 24 0 array_in array_out array_recv array_send i x 0 regproc[]
1009 _text -1 f b A f 25 0 array_in array_out array_recv array_send i x 100 text[]
1010 _tid -1 f b A f 27 0 array_in array_out array_recv array_send i x 0 tid[]
1011 _xid -1 f b A f 28 0 array_in array_out array_recv array_send i x 0 xid[]
1012 _cid -1 f b A f 29 0 array_in array_out array_recv array_send i x 0 cid[]
1013 _oidvector -1 f b A f 30 0 array_in array_out array_recv array_send i x 0 oidvector[]
1014 _bpchar -1 f b A f 1042 0 array_in array_out array_recv array_send i x 100 character[]
1015 _varchar -1 f b A f 1043 0 array_in array_out array_recv array_send i x 100 character_varying[]
1016 _int8 -1 f b A f 20 0 array_in array_out array_recv array_send d x 0 bigint[]
1021 _float4 -1 f b A f 700 0 array_in array_out array_recv array_send i x 0 real[]
1022 _float8 -1 f b A f 701 0 array_in array_out array_recv array_send d x 0 double_precision[]
1028 _oid -1 f b A f 26 0 array_in array_out array_recv array_send i x 0 oid[]
1040 _macaddr -1 f b A f 829 0 array_in array_out array_recv array_send i x 0 macaddr[]
1041 _inet -1 f b A f 869 0 array_in array_out array_recv array_send i x 0 inet[]
1042 bpchar -1 f b S f 0 1014 bpcharin bpcharout bpcharrecv bpcharsend i x 100 character
1043 varchar -1 f b S f 0 1015 varcharin varcharout varcharrecv varcharsend i x 100 character_varying
1082 date 4 t b D f 0 1182 date_in date_out date_recv date_send i p 0 date
1083 time 8 t b D f 0 1183 time_in time_out time_recv time_send d p 0 time_without_time_zone
1114 timestamp 8 t b D f 0 1115 timestamp_in timestamp_out timestamp_recv timestamp_send d p 0
  timestamp_without_time_zone
1115 _timestamp -1 f b A f 1114 0 array_in array_out array_recv array_send d x 0 timestamp_without_time_zone[]
1182 _date -1 f b A f 1082 0 array_in array_out array_recv array_send i x 0 date[]
1183 _time -1 f b A f 1083 0 array_in array_out array_recv array_send d x 0 time_without_time_zone[]
1184 timestamptz 8 t b D t 0 1185 timestamptz_in timestamptz_out timestamptz_recv timestamptz_send d p 0
  timestamp_with_time_zone
1185 _timestamptz -1 f b A f 1184 0 array_in array_out array_recv array_send d x 0 timestamp_with_time_zone[]
1186 interval 16 f b T t 0 1187 interval_in interval_out interval_recv interval_send d p 0 interval
1187 _interval -1 f b A f 1186 0 array_in array_out array_recv array_send d x 0 interval[]
1231 _numeric -1 f b A f 1700 0 array_in array_out array_recv array_send i x 0 numeric[]
1263 _cstring -1 f b A f 2275 0 array_in array_out array_recv array_send i x 0 cstring[]
1266 timetz 12 f b D f 0 1270 timetz_in timetz_out timetz_recv timetz_send d p 0 time_with_time_zone
1270 _timetz -1 f b A f 1266 0 array_in array_out array_recv array_send d x 0 time_with_time_zone[]
1560 bit -1 f b V f 0 1561 bit_in bit_out bit_recv bit_send i x 0 bit
1561 _bit -1 f b A f 1560 0 array_in array_out array_recv array_send i x 0 bit[]
1562 varbit -1 f b V t 0 1563 varbit_in varbit_out varbit_recv varbit_send i x 0 bit_varying
1563 _varbit -1 f b A f 1562 0 array_in array_out array_recv array_send i x 0 bit_varying[]
1700 numeric -1 f b N f 0 1231 numeric_in numeric_out numeric_recv numeric_send i m 0 numeric
1790 refcursor -1 f b U f 0 2201 textin textout textrecv textsend i x 0 refcursor
2201 _refcursor -1 f b A f 1790 0 array_in array_out array_recv array_send i x 0 refcursor[]
2202 regprocedure 4 t b N f 0 2207 regprocedurein regprocedureout regprocedurerecv regproceduresend i p 0 regprocedure
2203 regoper 4 t b N f 0 2208 regoperin regoperout regoperrecv regopersend i p 0 regoper
2205 regclass 4 t b N f 0 2210 regclassin regclassout regclassrecv regclasssend i p 0 regclass
2206 regtype 4 t b N f 0 2211 regtypein regtypeout regtyperecv regtypesend i p 0 regtype
2207 _regprocedure -1 f b A f 2202 0 array_in array_out array_recv array_send i x 0 regprocedure[]
2208 _regoper -1 f b A f 2203 0 array_in array_out array_recv array_send i x 0 regoper[]
2210 _regclass -1 f b A f 2205 0 array_in array_out array_recv array_send i x 0 regclass[]
2211 _regtype -1 f b A f 2206 0 array_in array_out array_recv array_send i x 0 regtype[]
2249 record -1 f p P f 0 2287 record_in record_out record_recv record_send d x 0 record
2275 cstring -2 f p P f 0 1263 cstring_in cstring_out cstring_recv cstring_send c p 0 cstring
2276 any 4 t p P f 0 0 any_in any_out - - i p 0 "any"
2277 anyarray -1 f p P f 0 0 anyarray_in anyarray_out anyarray_recv anyarray_send d x 0 anyarray
2278 void 4 t p P f 0 0 void_in void_out void_recv void_send i p 0 void
2279 trigger 4 t p P f 0 0 trigger_in trigger_out - - i p 0 trigger
2283 anyelement 4 t p P f 0 0 anyelement_in anyelement_out - - i p 0 anyelement
2287 _record -1 f p P f 2249 0 array_in array_out array_recv array_send d x 0 record[]
2776 anynonarray 4 t p P f 0 0 anynonarray_in anynonarray_out - - i p 0 anynonarray
2950 uuid 16 f b U f 0 2951 uuid_in uuid_out uuid_recv uuid_send c p 0 uuid
2951 _uuid -1 f b A f 2950 0 array_in array_out array_recv array_send i x 0 uuid[]
3614 tsvector -1 f b U f 0 3643 tsvectorin tsvectorout tsvectorrecv tsvectorsend i x 0 tsvector
3615 tsquery -1 f b U f 0 3645 tsqueryin tsqueryout tsqueryrecv tsquerysend i p 0 tsquery
3643 _tsvector -1 f b A f 3614 0 array_in array_out array_recv array_send i x 0 tsvector[]
3645 _tsquery -1 f b A f 3615 0 array_in array_out array_recv array_send i x 0 tsquery[]
3802 jsonb -1 f b U f 0 3807 jsonb_in jsonb_out jsonb_recv jsonb_send i x 0 jsonb
3807 _jsonb -1 f b A f 3802 0 array_in array_out array_recv array_send i x 0 jsonb[]
3904 int4range -1 f r R f 0 3905 range_in range_out range_recv range_send i x 0 int4range
3905 _int4range -1 f b A f 3904 0 array_in array_out array_recv array_send i x 0 int4range[]
3906 numrange -1 f r R f 0 3907 range_in range_out range_recv range_send i x 0 numrange
3907 _numrange -1 f b A f 3906 0 array_in array_out array_recv array_send i x 0 numrange[]
3908 tsrange -1 f r R f 0 3909 range_in range_out range_recv range_send d x 0 tsrange
3909 _tsrange -1 f b A f 3908 0 array_in array_out array_recv array_send d x 0 tsrange[]
3910 tstzrange -1 f r R f 0 3911 range_in range_out range_recv range_send d x 0 tstzrange
3911 _tstzrange -1 f b A f 3910 0 array_in array_out array_recv array_send d x 0 tstzrange[]
3912 daterange -1 f r R f 0 3913 range_in range_out range_recv range_send i x 0 daterange
3913 _daterange -1 f b A f 3912 0 array_in array_out array_recv array_send i x 0 daterange[]
3926 int8range -1 f r R f 0 3927 range_in range_out range_recv range_send d x 0 int8range
3927 _int8range -1 f b A f 3926 0 array_in array_out array_recv array_send d x 0 int8range[]
4072 jsonpath -1 f b U f 0 4073 jsonpath_in jsonpath_out jsonpath_recv jsonpath_send i x 0 jsonpath
4073 _jsonpath -1 f b A f 4072 0 array_in array_out array_recv array_send i x 0 jsonpath[]
4089 regnamespace 4 t b N f 0 4090 regnamespacein regnamespaceout regnamespacerecv regnamespacesend i p 0 regnamespace
4090 _regnamespace -1 f b A f 4089 0 array_in array_out array_recv array_send i x 0 regnamespace[]
4096 regrole 4 t b N f 0 4097 regrolein regroleout regrolerecv regrolesend i p 0 regrole
4097 _regrole -1 f b A f 4096 0 array_in array_out array_recv array_send i x 0 regrole[]
5069 xid8 8 t b U f 0 271 xid8in xid8out xid8recv xid8send d p 0 xid8
"""
