"""What SQL may do: ordinary statements that must pass, hostile ones that must be refused or have no effect."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runner.database import open_database

from .runner_database import TenantDatabase

SCHEMA = """
CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT UNIQUE, n INTEGER DEFAULT 7, r REAL, b BLOB);
INSERT INTO t VALUES (1,'one',10,1.5,x'01'),(2,'two',20,2.5,x'02'),(3,'three',30,NULL,NULL);
CREATE TABLE child(id INTEGER PRIMARY KEY, t_id INTEGER REFERENCES t(id) ON DELETE CASCADE);
INSERT INTO child VALUES (1,1),(2,1),(3,2);
CREATE TABLE log(what TEXT);
CREATE INDEX t_n ON t(n);
CREATE VIEW v AS SELECT id, name FROM t WHERE n > 10;
CREATE VIRTUAL TABLE f USING fts5(title, body);
INSERT INTO f VALUES ('red fox','the quick red fox jumps'),('blue whale','a whale swims'),('fox two','another fox');
CREATE VIRTUAL TABLE box USING rtree(id, x0, x1, y0, y1);
INSERT INTO box VALUES (1,0,1,0,1),(2,5,6,5,6);
CREATE TABLE j(doc TEXT);
INSERT INTO j VALUES ('{"a":1,"tags":["x","y"]}');
"""

ANY = object()

ORDINARY = [
    # literals, expressions, functions
    ("SELECT 1", [[1]]),
    ("SELECT 'attach', 'load_extension', 'pragma max_page_count'", [["attach", "load_extension", "pragma max_page_count"]]),
    ('SELECT 1 AS vacuum, 2 AS "attach", 3 AS [pragma]', [[1, 2, 3]]),
    ('CREATE TABLE "attach"("detach", vacuum); INSERT INTO "attach" VALUES (1, 2); SELECT vacuum FROM "attach"', [[2]]),
    ("SELECT abs(-3), round(2.567, 2), sign(-2)", [[3, 2.57, -1]]),
    ("SELECT sqrt(16), pow(2, 10), log10(1000), ceil(1.2), floor(1.8), mod(7, 3)", [[4.0, 1024.0, 3.0, 2.0, 1.0, 1.0]]),
    ("SELECT round(sin(0) + cos(0) + exp(0) + ln(1) + degrees(0), 6), pi() > 3", [[2.0, 1]]),
    ("SELECT upper('a') || lower('B') || trim('  c ') || substr('hello', 2, 3)", [["Abcell"]]),
    ("SELECT replace('aXb','X','-'), instr('abc','c'), length('é'), octet_length('é')", [["a-b", 3, 1, 2]]),
    ("SELECT printf('%05.1f|%s', 3.14159, 'x'), format('%d', 5)", [["003.1|x", "5"]]),
    ("SELECT hex(x'00ff'), quote('it''s'), typeof(1.0), unicode('a'), char(65,66)", [["00FF", "'it''s'", "real", 97, "AB"]]),
    ("SELECT coalesce(NULL, 2), ifnull(NULL, 3), nullif(1,1), iif(1,'y','n')", [[2, 3, None, "y"]]),
    ("SELECT CASE WHEN 1 THEN 'a' ELSE 'b' END, CAST('12' AS INTEGER), 7 / 2, 7 % 4, 1 << 4, ~0", [["a", 12, 3, 3, 16, -1]]),
    ("SELECT date('2024-02-29','+1 year'), time('12:00','+90 minutes')", [["2025-03-01", "13:30:00"]]),
    (
        "SELECT strftime('%Y-%m','2024-05-06'), julianday('2000-01-01 12:00'), unixepoch('1970-01-02')",
        [["2024-05", 2451545.0, 86400]],
    ),
    ("SELECT timediff('2024-01-02','2024-01-01'), datetime('now') > '2020'", [["+0000-00-01 00:00:00.000", 1]]),
    ("SELECT typeof(random()), length(randomblob(8)), length(zeroblob(5))", [["integer", 8, 5]]),
    ("SELECT min(3,1,2), max(3,1,2), likely(1), unlikely(0)", [[1, 3, 1, 0]]),
    ("SELECT 'abc' LIKE 'A%', 'abc' GLOB 'a*', 'a_c' LIKE 'a\\_c' ESCAPE '\\'", [[1, 1, 1]]),
    ("SELECT 'a' = 'A' COLLATE NOCASE, 'a ' = 'a' COLLATE RTRIM", [[1, 1]]),
    ("SELECT NULL IS NULL, 1 IS NOT DISTINCT FROM 1, 3 BETWEEN 1 AND 5, 2 IN (1,2)", [[1, 1, 1, 1]]),
    ("SELECT (1,2) < (1,3), 1_000_000, 0xff", [[1, 1000000, 255]]),
    ("SELECT sqlite_version() > '3.50'", [[1]]),
    ("SELECT concat('a', 1), concat_ws('-', 'a', 'b'), string_agg(name, ',') FROM t WHERE id < 3", [["a1", "a-b", "one,two"]]),
    ("SELECT last_insert_rowid(), changes(), total_changes()", ANY),
    # reading
    ("SELECT * FROM t WHERE id = 1", [[1, "one", 10, 1.5, {"$blob": "AQ=="}]]),
    ("SELECT count(*), sum(n), avg(n), total(n), group_concat(id) FROM t", [[3, 60, 20.0, 60.0, "1,2,3"]]),
    ("SELECT n > 10 AS big, count(*) FROM t GROUP BY big HAVING count(*) > 1", [[1, 2]]),
    ("SELECT count(*) FILTER (WHERE n > 10) FROM t", [[2]]),
    ("SELECT t.id, child.id FROM t LEFT JOIN child ON t_id = t.id ORDER BY 1, 2", [[1, 1], [1, 2], [2, 3], [3, None]]),
    ("SELECT count(*) FROM t NATURAL JOIN child", [[3]]),
    ("SELECT t.id FROM child RIGHT JOIN t ON t_id = t.id WHERE child.id IS NULL", [[3]]),
    ("SELECT count(*) FROM t FULL OUTER JOIN child ON t.id = child.id", [[3]]),
    ("SELECT count(*) FROM t CROSS JOIN child", [[9]]),
    ("SELECT name FROM t WHERE EXISTS (SELECT 1 FROM child WHERE t_id = t.id)", [["one"], ["two"]]),
    ("SELECT id FROM t WHERE n = (SELECT max(n) FROM t)", [[3]]),
    ("SELECT id FROM t ORDER BY r DESC NULLS FIRST LIMIT 1 OFFSET 0", [[3]]),
    ("SELECT DISTINCT t_id FROM child ORDER BY 1", [[1], [2]]),
    ("SELECT 1 UNION SELECT 2 UNION ALL SELECT 2 EXCEPT SELECT 1", [[2]]),
    ("SELECT 1 INTERSECT SELECT 1", [[1]]),
    ("VALUES (1,'a'),(2,'b')", [[1, "a"], [2, "b"]]),
    ("SELECT * FROM v", [[2, "two"], [3, "three"]]),
    ("SELECT name FROM sqlite_schema WHERE type = 'view'", [["v"]]),
    ("SELECT count(*) FROM sqlite_master WHERE name = 't'", [[1]]),
    ("SELECT count(*) FROM temp.sqlite_schema", [[0]]),
    ("SELECT id FROM t INDEXED BY t_n WHERE n = 20", [[2]]),
    ("SELECT rowid, _rowid_, oid FROM t WHERE id = 1", [[1, 1, 1]]),
    # window functions and recursion
    (
        "SELECT id, row_number() OVER (ORDER BY n DESC), rank() OVER w FROM t WINDOW w AS (ORDER BY n) ORDER BY id LIMIT 1",
        [[1, 3, 1]],
    ),
    ("SELECT sum(n) OVER (ORDER BY id ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM t", [[10], [30], [50]]),
    ("SELECT lag(id,1,0) OVER (ORDER BY id), lead(id) OVER (ORDER BY id), ntile(2) OVER (ORDER BY id) FROM t", ANY),
    ("SELECT first_value(id) OVER (PARTITION BY n > 10 ORDER BY id), nth_value(id,1) OVER () FROM t", ANY),
    ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x < 100) SELECT sum(x) FROM c", [[5050]]),
    ("WITH a AS MATERIALIZED (SELECT 1 AS x), b AS NOT MATERIALIZED (SELECT x FROM a) SELECT x FROM b", [[1]]),
    # JSON
    ("SELECT json_extract(doc,'$.a'), doc->'$.tags', doc->>'$.a' FROM j", [[1, '["x","y"]', 1]]),
    ("SELECT value FROM j, json_each(doc,'$.tags')", [["x"], ["y"]]),
    ('SELECT count(*) FROM json_tree(\'{"a":[1,2,{"b":3}]}\')', [[6]]),
    ("SELECT json_object('a',1), json_array(1,'b'), json_valid('{'), json_type('[]')", [['{"a":1}', '[1,"b"]', 0, "array"]]),
    ("SELECT json_set('{}','$.x',1), json_remove('{\"a\":1}','$.a'), json_patch('{}','{\"b\":2}')", [['{"x":1}', "{}", '{"b":2}']]),
    ("SELECT json_group_array(id), json_group_object(name,id) FROM t WHERE id<3", [["[1,2]", '{"one":1,"two":2}']]),
    ("SELECT json(jsonb('{\"a\":1}')), json_array_length('[1,2,3]')", [['{"a":1}', 3]]),
    # writing
    ("INSERT INTO t(name) VALUES ('four') RETURNING id, n", [[4, 7]]),
    ("INSERT INTO t DEFAULT VALUES; SELECT count(*) FROM t", [[4]]),
    ("INSERT INTO t(id, n) SELECT id + 10, n FROM t; SELECT count(*) FROM t", [[6]]),
    ("INSERT OR IGNORE INTO t(id) VALUES (1); SELECT count(*) FROM t", [[3]]),
    ("REPLACE INTO t(id, name) VALUES (1, 'uno'); SELECT name FROM t WHERE id = 1", [["uno"]]),
    ("INSERT INTO t(id,name) VALUES (1,'x') ON CONFLICT(id) DO UPDATE SET name = excluded.name RETURNING name", [["x"]]),
    ("INSERT INTO t(name) VALUES ('one') ON CONFLICT DO NOTHING; SELECT count(*) FROM t", [[3]]),
    ("UPDATE t SET n = n + 1 WHERE id = 1 RETURNING n", [[11]]),
    ("UPDATE t SET n = c.id FROM child AS c WHERE c.t_id = t.id AND c.id = 3; SELECT n FROM t WHERE id = 2", [[3]]),
    ("DELETE FROM t WHERE id = 3 RETURNING name", [["three"]]),
    ("DELETE FROM log; SELECT count(*) FROM log", [[0]]),
    # schema
    (
        "CREATE TABLE a(x INTEGER NOT NULL CHECK (x > 0), y AS (x * 2) STORED, z AS (x + 1)); "
        "INSERT INTO a(x) VALUES (2); SELECT * FROM a",
        [[2, 4, 3]],
    ),
    ("CREATE TABLE s(a INT, b TEXT, c ANY) STRICT; INSERT INTO s VALUES (1,'x',x'01'); SELECT a FROM s", [[1]]),
    ("CREATE TABLE w(k TEXT PRIMARY KEY, v) WITHOUT ROWID; INSERT INTO w VALUES ('a',1); SELECT v FROM w", [[1]]),
    ("CREATE TABLE a(id INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO a DEFAULT VALUES; SELECT seq FROM sqlite_sequence", [[1]]),
    ("CREATE TABLE IF NOT EXISTS t(z); SELECT count(*) FROM t", [[3]]),
    ("CREATE TABLE copy AS SELECT * FROM t; SELECT count(*) FROM copy", [[3]]),
    ("CREATE INDEX p ON t(name) WHERE n > 10; SELECT name FROM t WHERE name='two' AND n > 10", [["two"]]),
    ("CREATE INDEX e ON t(lower(name)); SELECT id FROM t WHERE lower(name) = 'one'", [[1]]),
    ("CREATE UNIQUE INDEX u ON t(n DESC); DROP INDEX u; DROP INDEX IF EXISTS u", []),
    ("ALTER TABLE t RENAME TO t2; SELECT count(*) FROM t2", [[3]]),
    ("ALTER TABLE log RENAME COLUMN what TO why; INSERT INTO log(why) VALUES (1); SELECT why FROM log", [["1"]]),
    ("ALTER TABLE t ADD COLUMN extra TEXT DEFAULT 'd' CHECK (length(extra) > 0); SELECT extra FROM t WHERE id=1", [["d"]]),
    ("ALTER TABLE t ADD COLUMN g AS (n + 1); SELECT g FROM t WHERE id = 1", [[11]]),
    ("ALTER TABLE t DROP COLUMN r; SELECT count(*) FROM pragma_table_info('t')", [[4]]),
    ("CREATE VIEW v2(a) AS SELECT n FROM t; SELECT max(a) FROM v2; DROP VIEW v2", [[30]]),
    ("DROP TABLE log; DROP TABLE IF EXISTS log", []),
    (
        "CREATE TRIGGER tr AFTER INSERT ON t BEGIN INSERT INTO log VALUES (new.name); END; "
        "INSERT INTO t(name) VALUES ('q'); SELECT what FROM log",
        [["q"]],
    ),
    (
        "CREATE TRIGGER up BEFORE UPDATE OF n ON t WHEN new.n < 0 BEGIN SELECT RAISE(IGNORE); END; "
        "UPDATE t SET n = -1; SELECT sum(n) FROM t",
        [[60]],
    ),
    (
        "CREATE TRIGGER io INSTEAD OF INSERT ON v BEGIN INSERT INTO t(name) VALUES (new.name); END; "
        "INSERT INTO v(name) VALUES ('z'); SELECT count(*) FROM t",
        [[4]],
    ),
    ("CREATE TRIGGER d AFTER DELETE ON child BEGIN DELETE FROM log; END; DROP TRIGGER d", []),
    # TEMP
    ("CREATE TEMP TABLE x(a); INSERT INTO x VALUES (1); SELECT a FROM temp.x", [[1]]),
    ("CREATE TABLE temp.y(a); INSERT INTO y VALUES (2); SELECT a FROM y", [[2]]),
    ("CREATE TEMP VIEW tv AS SELECT 3 AS a; SELECT a FROM tv; DROP VIEW tv", [[3]]),
    (
        "CREATE TEMP TRIGGER tt AFTER INSERT ON t BEGIN INSERT INTO log VALUES ('temp'); END; "
        "INSERT INTO t(name) VALUES ('k'); SELECT what FROM log",
        [["temp"]],
    ),
    ("CREATE TEMP TABLE x(a); CREATE INDEX temp.xi ON x(a); DROP INDEX temp.xi; DROP TABLE x", []),
    # transactions
    ("BEGIN; INSERT INTO log VALUES ('a'); COMMIT; SELECT what FROM log", [["a"]]),
    ("BEGIN IMMEDIATE; INSERT INTO log VALUES ('a'); ROLLBACK; SELECT count(*) FROM log", [[0]]),
    ("BEGIN EXCLUSIVE; END TRANSACTION; SELECT 1", [[1]]),
    (
        "SAVEPOINT a; INSERT INTO log VALUES (1); SAVEPOINT b; INSERT INTO log VALUES (2); ROLLBACK TO b; "
        "RELEASE a; SELECT count(*) FROM log",
        [[1]],
    ),
    # full text, r-tree
    ("SELECT title FROM f WHERE f MATCH 'fox' ORDER BY rank", ANY),
    ("SELECT title FROM f('whale')", [["blue whale"]]),
    ("SELECT highlight(f,1,'<b>','</b>') FROM f('quick')", [["the <b>quick</b> red fox jumps"]]),
    ("SELECT snippet(f,-1,'[',']','…',4), bm25(f) < 0 FROM f('whale') LIMIT 1", ANY),
    ("SELECT count(*) FROM f WHERE f MATCH 'title:fox AND body:qui*'", [[1]]),
    ("INSERT INTO f(f) VALUES ('rebuild'); INSERT INTO f(f) VALUES ('optimize'); SELECT count(*) FROM f('fox')", [[2]]),
    ("INSERT INTO f(f, rank) VALUES ('merge', 50); INSERT INTO f(f) VALUES ('integrity-check'); SELECT 1", [[1]]),
    ("INSERT INTO f(f, rank) VALUES ('automerge', 4); INSERT INTO f(f, rank) VALUES ('rank', 'bm25(10.0, 1.0)'); SELECT 1", [[1]]),
    ("UPDATE f SET body = 'green' WHERE rowid = 1; DELETE FROM f WHERE rowid = 2; SELECT count(*) FROM f", [[2]]),
    ("CREATE VIRTUAL TABLE fv USING fts5vocab(f, 'row'); SELECT doc FROM fv WHERE term = 'fox'", [[2]]),
    (
        "CREATE VIRTUAL TABLE g USING fts5(a, tokenize='porter unicode61', prefix='2 3'); "
        "INSERT INTO g VALUES ('running'); SELECT a FROM g('run')",
        [["running"]],
    ),
    (
        "CREATE VIRTUAL TABLE tri USING fts5(a, tokenize='trigram'); INSERT INTO tri VALUES ('abcdef'); SELECT a FROM tri('cde')",
        [["abcdef"]],
    ),
    (
        "CREATE VIRTUAL TABLE ext USING fts5(name, content='t', content_rowid='id'); "
        "INSERT INTO ext(ext) VALUES ('rebuild'); SELECT rowid FROM ext('two')",
        [[2]],
    ),
    (
        "CREATE VIRTUAL TABLE cl USING fts5(a, content='', contentless_delete=1); "
        "INSERT INTO cl(rowid,a) VALUES (5,'hi'); SELECT rowid FROM cl('hi')",
        [[5]],
    ),
    ("ALTER TABLE f RENAME TO f2; SELECT count(*) FROM f2('fox'); DROP TABLE f2", [[2]]),
    ("CREATE VIRTUAL TABLE temp.tf USING fts5(a); INSERT INTO tf VALUES ('x'); SELECT a FROM tf('x')", [["x"]]),
    ("SELECT id FROM box WHERE x0 >= 4 AND y1 <= 7", [[2]]),
    (
        "CREATE VIRTUAL TABLE ib USING rtree_i32(id, a, b, +note); INSERT INTO ib VALUES (1, 1, 2, 'n'); "
        "SELECT note FROM ib WHERE a < 5",
        [["n"]],
    ),
    ("UPDATE box SET x1 = 9 WHERE id = 1; DELETE FROM box WHERE id = 2; DROP TABLE box", []),
    # PRAGMA and upkeep
    ("PRAGMA foreign_keys = ON; DELETE FROM t WHERE id = 1; SELECT count(*) FROM child", [[1]]),
    ("PRAGMA foreign_keys", [[0]]),
    ("PRAGMA table_info(log)", [[0, "what", "TEXT", 0, None, 0]]),
    ("PRAGMA main.table_xinfo('log')", [[0, "what", "TEXT", 0, None, 0, 0]]),
    ("SELECT name FROM pragma_table_info('log')", [["what"]]),
    ("SELECT count(*) FROM pragma_table_list WHERE name = 't'", [[1]]),
    ("PRAGMA index_list(t); PRAGMA index_info(t_n); PRAGMA index_xinfo(t_n)", ANY),
    ("PRAGMA foreign_key_list(child); PRAGMA foreign_key_check; PRAGMA foreign_key_check(child)", []),
    ("PRAGMA INTEGRITY_CHECK", [["ok"]]),
    ("PRAGMA quick_check(10)", [["ok"]]),
    ("PRAGMA page_size", [[4096]]),
    ("PRAGMA page_count; PRAGMA freelist_count; PRAGMA data_version; PRAGMA collation_list", ANY),
    ("PRAGMA encoding", [["UTF-8"]]),
    ("PRAGMA user_version = 5; PRAGMA user_version", [[5]]),
    ("PRAGMA application_id = 7; PRAGMA application_id", [[7]]),
    ("PRAGMA recursive_triggers = ON; PRAGMA defer_foreign_keys = ON; PRAGMA ignore_check_constraints = ON; SELECT 1", [[1]]),
    ("PRAGMA analysis_limit = 100; PRAGMA optimize; PRAGMA optimize(0x10002)", ANY),
    ("ANALYZE; SELECT count(*) > 0 FROM sqlite_stat1; ANALYZE t", [[1]]),
    ("REINDEX; REINDEX t; REINDEX t_n; REINDEX NOCASE", []),
    ("VACUUM; SELECT count(*) FROM t", [[3]]),
    ("VACUUM main; VACUUM; SELECT count(*) FROM f('fox')", [[2]]),
    ("CREATE TEMP TABLE x(a); VACUUM temp; SELECT 1", [[1]]),
    ("EXPLAIN SELECT * FROM t", ANY),
    ("EXPLAIN QUERY PLAN SELECT * FROM t WHERE n = 20", ANY),
    ("EXPLAIN DELETE FROM t; SELECT count(*) FROM t", [[3]]),
    ("EXPLAIN VACUUM", ANY),
    # nothing at all
    ("", []),
    (" ;; ", []),
    ("-- only a comment", []),
    ("/* a */ SELECT 1 -- b", [[1]]),
]

FORBIDDEN = [
    ("ATTACH '/data/db.sqlite' AS x", "ATTACH"),
    ("ATTACH DATABASE ':memory:' AS x", "ATTACH"),
    ("ATTACH '' AS x", "ATTACH"),
    ("attach 'file:/etc/passwd?mode=ro' as x", "ATTACH"),
    ("ATTACH (SELECT '/tmp/x') AS x", "ATTACH"),
    ("ATTACH ? AS x", "ATTACH"),
    ("EXPLAIN ATTACH '' AS x", "ATTACH"),
    ("SELECT 1; ATTACH 'x' AS y", "ATTACH"),
    ("VACUUM; ATTACH '' AS x", "ATTACH"),
    ("REINDEX; ATTACH '' AS x", "ATTACH"),
    ("VACUUM /* a */; /* b */ ATTACH '' AS x -- c", "ATTACH"),
    ("VACUUM INTO '/data/copy.sqlite'", "ATTACH"),
    ("VACUUM main INTO '/tmp/copy.sqlite'", "ATTACH"),
    ("VACUUM INTO (SELECT '/data/db.sqlite-journal')", "ATTACH"),
    ("VACUUM INTO 'file:/tmp/x?vfs=unix-none'", "ATTACH"),
    ("DETACH main", "DETACH"),
    ("VACUUM; DETACH temp", "DETACH"),
    ("SELECT load_extension('/tmp/x.so')", "load_extension"),
    ("SELECT LOAD_Extension('x', 'y')", "load_extension"),
    ("SELECT load_extension()", "load_extension"),
    ("SELECT 1 WHERE load_extension('x')", "load_extension"),
    (
        "CREATE TABLE x(a); CREATE TRIGGER tr AFTER INSERT ON x BEGIN SELECT load_extension('x'); END; INSERT INTO x VALUES (1)",
        "load_extension",
    ),
    ("SELECT readfile('/etc/shadow')", "readfile"),
    ("SELECT writefile('/data/x', 'y')", "writefile"),
    ("SELECT edit('x')", "edit"),
    ("SELECT fts3_tokenizer('simple')", "fts3_tokenizer"),
    ("SELECT fts3_tokenizer('simple', x'4141414141414141')", "fts3_tokenizer"),
    ("SELECT sqlite_log(1, 'x')", "sqlite_log"),
    ("SELECT sqlite_compileoption_get(1)", "sqlite_compileoption_get"),
    ("SELECT sqlite_compileoption_used('x')", "sqlite_compileoption_used"),
    ("SELECT sqlite_source_id()", "sqlite_source_id"),
    ("SELECT rtreenode(2, x'00')", "rtreenode"),
    ("SELECT rtreedepth(x'0000')", "rtreedepth"),
    ("SELECT rtreecheck('box')", "rtreecheck"),
    ("SELECT fts5(1)", "fts5"),
    ("SELECT fts5_source_id()", "fts5_source_id"),
    ("SELECT fts5_locale('en', 'x')", "fts5_locale"),
    ("SELECT fts5_insttoken('x')", "fts5_insttoken"),
    ("SELECT geopoly_debug(1)", "geopoly_debug"),
    ("PRAGMA max_page_count", "PRAGMA max_page_count"),
    ("PRAGMA max_page_count = 4294967294", "PRAGMA max_page_count"),
    ("pragma MAIN.Max_Page_Count(99999)", "PRAGMA max_page_count"),
    ('PRAGMA "max_page_count" = 99999', "PRAGMA max_page_count"),
    ("PRAGMA/**/max_page_count/**/=/**/99999", "PRAGMA max_page_count"),
    ("EXPLAIN PRAGMA max_page_count = 99999", "PRAGMA max_page_count"),
    ("PRAGMA page_size = 65536", "PRAGMA page_size"),
    ("PRAGMA page_size(65536)", "PRAGMA page_size"),
    ("PRAGMA journal_mode = WAL", "PRAGMA journal_mode"),
    ("PRAGMA journal_mode", "PRAGMA journal_mode"),
    ("PRAGMA journal_mode = OFF", "PRAGMA journal_mode"),
    ("PRAGMA journal_size_limit = 1", "PRAGMA journal_size_limit"),
    ("PRAGMA synchronous = OFF", "PRAGMA synchronous"),
    ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA locking_mode"),
    ("PRAGMA temp_store = FILE", "PRAGMA temp_store"),
    ("PRAGMA temp_store_directory = '/data'", "PRAGMA temp_store_directory"),
    ("PRAGMA data_store_directory = '/data'", "PRAGMA data_store_directory"),
    ("PRAGMA cache_size = 1000000", "PRAGMA cache_size"),
    ("PRAGMA cache_spill = 1", "PRAGMA cache_spill"),
    ("PRAGMA mmap_size = 1000000000", "PRAGMA mmap_size"),
    ("PRAGMA hard_heap_limit = 1", "PRAGMA hard_heap_limit"),
    ("PRAGMA soft_heap_limit = 1", "PRAGMA soft_heap_limit"),
    ("PRAGMA threads = 8", "PRAGMA threads"),
    ("PRAGMA trusted_schema = ON", "PRAGMA trusted_schema"),
    ("PRAGMA writable_schema = ON", "PRAGMA writable_schema"),
    ("PRAGMA writable_schema = RESET", "PRAGMA writable_schema"),
    ("PRAGMA schema_version = 1", "PRAGMA schema_version"),
    ("PRAGMA cell_size_check = OFF", "PRAGMA cell_size_check"),
    ("PRAGMA query_only = ON", "PRAGMA query_only"),
    ("PRAGMA read_uncommitted = ON", "PRAGMA read_uncommitted"),
    ("PRAGMA busy_timeout = 100000", "PRAGMA busy_timeout"),
    ("PRAGMA wal_checkpoint", "PRAGMA wal_checkpoint"),
    ("PRAGMA wal_autocheckpoint = 1", "PRAGMA wal_autocheckpoint"),
    ("PRAGMA auto_vacuum = FULL", "PRAGMA auto_vacuum"),
    ("PRAGMA incremental_vacuum", "PRAGMA incremental_vacuum"),
    ("PRAGMA encoding = 'UTF-16'", "PRAGMA encoding"),
    ("PRAGMA secure_delete = ON", "PRAGMA secure_delete"),
    ("PRAGMA legacy_alter_table = ON", "PRAGMA legacy_alter_table"),
    ("PRAGMA reverse_unordered_selects = 1", "PRAGMA reverse_unordered_selects"),
    ("PRAGMA shrink_memory", "PRAGMA shrink_memory"),
    ("PRAGMA lock_status", "PRAGMA lock_status"),
    ("PRAGMA key = 'x'", "PRAGMA key"),
    ("PRAGMA rekey = 'x'", "PRAGMA rekey"),
    ("PRAGMA cipher = 'x'", "PRAGMA cipher"),
    ("PRAGMA vdbe_trace = 1", "PRAGMA vdbe_trace"),
    ("PRAGMA parser_trace = 1", "PRAGMA parser_trace"),
    ("PRAGMA compile_options", "PRAGMA compile_options"),
    ("PRAGMA function_list", "PRAGMA function_list"),
    ("PRAGMA module_list", "PRAGMA module_list"),
    ("PRAGMA pragma_list", "PRAGMA pragma_list"),
    ("PRAGMA database_list", "PRAGMA database_list"),
    ("SELECT file FROM pragma_database_list", "PRAGMA database_list"),
    ("SELECT * FROM pragma_max_page_count", "PRAGMA max_page_count"),
    ("SELECT * FROM pragma_compile_options", "PRAGMA compile_options"),
    ("PRAGMA no_such_pragma", "PRAGMA no_such_pragma"),
    ("CREATE VIRTUAL TABLE x USING dbstat", "CREATE VIRTUAL TABLE USING dbstat"),
    ("CREATE VIRTUAL TABLE x USING fts3(a)", "CREATE VIRTUAL TABLE USING fts3"),
    ("CREATE VIRTUAL TABLE x USING FTS4(a)", "CREATE VIRTUAL TABLE USING fts4"),
    ("CREATE VIRTUAL TABLE x USING fts4aux(f)", "CREATE VIRTUAL TABLE USING fts4aux"),
    ("CREATE VIRTUAL TABLE x USING geopoly(a)", "CREATE VIRTUAL TABLE USING geopoly"),
    ("CREATE VIRTUAL TABLE temp.x USING csv(filename='/etc/passwd')", "CREATE VIRTUAL TABLE USING csv"),
    ("CREATE VIRTUAL TABLE x USING json_each", "CREATE VIRTUAL TABLE USING json_each"),
    ("CREATE VIRTUAL TABLE x USING sqlite_dbpage", "CREATE VIRTUAL TABLE USING sqlite_dbpage"),
]

WITHOUT_EFFECT = [
    # (statement, the verdict SQLite gives it, question, the answer that shows that nothing happened)
    ("UPDATE sqlite_schema SET sql = 'x'", "sql_error", "PRAGMA integrity_check", [["ok"]]),
    ("DELETE FROM sqlite_master", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("INSERT INTO sqlite_schema VALUES ('table','x','x',2,'CREATE TABLE x(a)')", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("DROP TABLE sqlite_schema", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("CREATE TRIGGER st AFTER INSERT ON sqlite_schema BEGIN SELECT 1; END", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("DELETE FROM f_data", "sql_error", "SELECT count(*) FROM f('fox')", [[2]]),
    ("UPDATE f_data SET block = x'00'", "sql_error", "SELECT count(*) FROM f('fox')", [[2]]),
    ("DROP TABLE f_idx", "sql_error", "SELECT count(*) FROM f('fox')", [[2]]),
    ("INSERT INTO box_node VALUES (9, x'00')", "sql_error", "SELECT count(*) FROM box", [[2]]),
    ("CREATE TABLE sqlite_x(a)", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("DELETE FROM sqlite_sequence", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("SELECT * FROM dbstat", "sql_error", "SELECT 1", [[1]]),
    ("SELECT * FROM sqlite_dbpage", "sql_error", "SELECT 1", [[1]]),
    ("UPDATE sqlite_dbpage SET data = zeroblob(4096)", "sql_error", "PRAGMA integrity_check", [["ok"]]),
    ("SELECT * FROM bytecode('SELECT 1')", "sql_error", "SELECT 1", [[1]]),
    ("SELECT * FROM tables_used('SELECT 1')", "sql_error", "SELECT 1", [[1]]),
    ("SELECT * FROM sqlite_stmt", "sql_error", "SELECT 1", [[1]]),
    ("SELECT * FROM generate_series(1, 10)", "sql_error", "SELECT 1", [[1]]),
    ("SELECT * FROM fsdir('/')", "sql_error", "SELECT 1", [[1]]),
    ('SELECT "no such column"', "sql_error", "SELECT 1", [[1]]),
    ("SELECT eval('DROP TABLE t')", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("SELECT sqlite_rename_table('main','x','y','z','w','v',0)", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("SELECT * FROM sqlite_stat1; .read /etc/passwd", "sql_error", "SELECT 1", [[1]]),
    ("CREATE VIEW lv AS SELECT load_extension('x'); SELECT * FROM lv", "sql_error", "SELECT count(*) FROM t", [[3]]),
    ("CREATE VIEW dv AS SELECT * FROM pragma_database_list; SELECT * FROM dv", "sql_error", "SELECT 1", [[1]]),
    ("VACUUM INTO ''", "ok", "SELECT count(*) FROM t", [[3]]),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    reply = TenantDatabase(folder).run(SCHEMA)
    assert reply["verdict"] == "ok", reply
    return folder / "db.sqlite"


@pytest.fixture
def tenant(filled: Path, tmp_path: Path) -> TenantDatabase:
    database = TenantDatabase(tmp_path)
    shutil.copyfile(filled, database.path)
    return database


def test_the_tables_are_broad():
    assert len(ORDINARY) >= 120
    assert len(FORBIDDEN) + len(WITHOUT_EFFECT) >= 80


@pytest.mark.parametrize(("sql", "rows"), ORDINARY, ids=[sql[:60] for sql, _ in ORDINARY])
def test_W2_an_ordinary_statement_passes(tenant, sql, rows):
    reply = tenant.run(sql)
    assert reply["verdict"] == "ok", reply
    if rows is not ANY:
        assert reply["rows"] == rows
    assert tenant.rows("PRAGMA integrity_check") == [["ok"]]


@pytest.mark.parametrize(("sql", "what"), FORBIDDEN, ids=[sql[:60] for sql, _ in FORBIDDEN])
def test_W2_a_hostile_statement_is_forbidden_and_named(tenant, sql, what):
    reply = tenant.run(sql, ["x"] if "?" in sql and "vfs" not in sql and "mode" not in sql else None)
    assert reply == {"verdict": "forbidden", "message": what}
    assert tenant.rows("SELECT count(*) FROM t") == [[3]]
    assert tenant.rows("PRAGMA page_size") == [[4096]]


@pytest.mark.parametrize(("sql", "verdict", "question", "answer"), WITHOUT_EFFECT, ids=[row[0][:60] for row in WITHOUT_EFFECT])
def test_a_hostile_statement_has_no_effect(tenant, sql, verdict, question, answer):
    before = sorted(tenant.path.parent.iterdir())
    assert tenant.run(sql)["verdict"] == verdict
    assert tenant.rows(question) == answer
    assert tenant.rows("PRAGMA integrity_check") == [["ok"]]
    assert sorted(tenant.path.parent.iterdir()) == before


def test_without_the_authorizer_the_same_pragma_does_raise_the_quota(tenant):
    """The control: SQLite itself, with every other switch set, lets SQL do it."""
    database = open_database(tenant.configuration, lambda: False, str(tenant.path))
    try:
        with pytest.raises(Exception, match="not authorized"):
            database.connection.pragma("max_page_count", 99_999)
        database.connection.authorizer = None
        assert database.connection.pragma("max_page_count", 99_999) == 99_999
    finally:
        database.close()


def test_a_database_cannot_be_attached_while_a_vacuum_that_is_not_the_last_statement_lies_behind(tenant):
    for script in (
        "VACUUM; VACUUM; ATTACH '' AS x",
        "ATTACH '' AS x; VACUUM",
        "VACUUM; SELECT 1; ATTACH '' AS x",
        "BEGIN; ATTACH '' AS x",
    ):
        assert tenant.run(script) == {"verdict": "forbidden", "message": "ATTACH"}


def test_a_stored_statement_is_judged_when_it_runs(tenant):
    sql = "CREATE TABLE trap(a); CREATE TRIGGER trap_t AFTER INSERT ON trap BEGIN SELECT sqlite_source_id(); END"
    assert tenant.run(sql)["verdict"] == "ok"
    assert tenant.run("INSERT INTO trap VALUES (1)") == {"verdict": "forbidden", "message": "sqlite_source_id"}
    assert tenant.rows("SELECT count(*) FROM trap") == [[0]]
