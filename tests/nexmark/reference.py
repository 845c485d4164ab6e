"""What each query of Nexmark gives over all rows, in DuckDB's SQL: nothing of it comes from the engine that is tested.

`person`, `auction`, `bid` and `side_input` are tables of the rows that were not late, with `_partition`, `_offset`,
`_timestamp`. `{closed}` is the last watermark as a timestamp: of windows that have closed.
"""

_RANKS = """
    count(*), count(*) FILTER (price < 10000), count(*) FILTER (price BETWEEN 10000 AND 999999),
    count(*) FILTER (price >= 1000000)"""
_DISTINCT = "".join(
    f""", count(DISTINCT {column}), count(DISTINCT {column}) FILTER (price < 10000),
    count(DISTINCT {column}) FILTER (price BETWEEN 10000 AND 999999),
    count(DISTINCT {column}) FILTER (price >= 1000000)"""
    for column in ("bidder", "auction")
)
# A window of ten seconds that begins at a multiple of them.
_TEN = "time_bucket(INTERVAL '10 seconds', {time}, TIMESTAMP '1970-01-01')"
_WINNING = (
    "FROM auction AS a JOIN bid AS b ON b.auction = a.id AND b.dateTime >= a.dateTime AND b.dateTime <= a.expires"
)
_COUNTS = """
    SELECT auction, e AS endtime, count(*) AS num
    FROM bid, range(0, 5) AS r(n),
        LATERAL (SELECT time_bucket(INTERVAL '2 seconds', dateTime, TIMESTAMP '1970-01-01')
            + INTERVAL '2 seconds' * (n + 1) AS e)
    GROUP BY ALL"""

REFERENCE = {
    "q0": "SELECT auction, bidder, price, dateTime, extra FROM bid",
    "q1": "SELECT auction, bidder, price * 0.908, dateTime, extra FROM bid",
    "q2": "SELECT auction, price FROM bid WHERE auction % 123 = 0",
    "q3": "SELECT name, city, state, a.id FROM person AS p, auction AS a "
    "WHERE seller = p.id AND category = 10 AND state IN ('OR', 'ID', 'CA')",
    "q4": f"SELECT category, avg(best) FROM (SELECT a.id, category, max(price) AS best {_WINNING} GROUP BY ALL) "
    "GROUP BY ALL",
    "q5": f"SELECT auction, num FROM ({_COUNTS}) WHERE endtime <= {{closed}} "
    "QUALIFY rank() OVER (PARTITION BY endtime ORDER BY num DESC) = 1",
    "q7": f"SELECT auction, price, bidder, dateTime, extra FROM bid WHERE TRUE QUALIFY price = max(price) OVER "
    f"(PARTITION BY {_TEN.format(time='dateTime')})",
    "q8": f"""SELECT DISTINCT p.id, name, w FROM (SELECT *, {_TEN.format(time="dateTime")} AS w FROM person) AS p
        JOIN (SELECT *, {_TEN.format(time="dateTime")} AS w FROM auction) AS a USING (w)
        WHERE seller = p.id AND w + INTERVAL '10 seconds' <= {{closed}}""",
    "q9": f"""SELECT a.* EXCLUDE (_partition, _offset, _timestamp), auction, bidder, price, b.dateTime, b.extra
        {_WINNING} QUALIFY row_number() OVER
        (PARTITION BY a.id ORDER BY price DESC, b.dateTime, b._partition, b._offset) = 1""",
    "q10": "SELECT auction, bidder, price, dateTime, extra, left(dateTime::VARCHAR, 10), (dateTime::VARCHAR)[12:16] "
    "FROM bid",
    # A session has ended when the watermark is behind its end: a row at exactly its end is still in it.
    "q11": """SELECT bidder, count(*), min(dateTime), max(dateTime) + INTERVAL '10 seconds' AS endtime FROM (
            SELECT *, sum(is_first::INTEGER) OVER (PARTITION BY bidder ORDER BY dateTime, _partition, _offset) AS number
            FROM (SELECT *, coalesce(dateTime - lag(dateTime) OVER (PARTITION BY bidder
                ORDER BY dateTime, _partition, _offset) > INTERVAL '10 seconds', TRUE) AS is_first FROM bid)
        ) GROUP BY bidder, number HAVING endtime < {closed}""",
    "q12": f"""SELECT bidder, count(*), w::TIMESTAMPTZ, (w + INTERVAL '10 seconds')::TIMESTAMPTZ
        FROM (SELECT bidder, {_TEN.format(time="_timestamp::TIMESTAMP")} AS w FROM bid)
        WHERE w + INTERVAL '10 seconds' <= {{closed}} GROUP BY ALL""",
    "q13": "SELECT auction, bidder, price, dateTime, value FROM bid JOIN side_input ON key = auction % 10000",
    "q14": """SELECT auction, bidder, price * 0.908,
        CASE WHEN hour(dateTime) BETWEEN 8 AND 18 THEN 'dayTime' WHEN hour(dateTime) IN (7, 19) THEN 'otherTime'
            ELSE 'nightTime' END,
        dateTime, extra, len(regexp_extract_all(extra, 'c'))
        FROM bid WHERE price * 0.908 > 1000000 AND price * 0.908 < 50000000""",
    "q15": f"SELECT left(dateTime::VARCHAR, 10), {_RANKS}{_DISTINCT} FROM bid GROUP BY 1",
    "q16": f"SELECT channel, left(dateTime::VARCHAR, 10), max((dateTime::VARCHAR)[12:16]), {_RANKS}{_DISTINCT} "
    "FROM bid GROUP BY 1, 2",
    "q17": f"SELECT auction, left(dateTime::VARCHAR, 10), {_RANKS}, min(price), max(price), avg(price), sum(price) "
    "FROM bid GROUP BY 1, 2",
    "q18": """SELECT auction, bidder, price, channel, url, dateTime, extra FROM bid QUALIFY row_number() OVER
        (PARTITION BY auction, bidder ORDER BY dateTime DESC, _partition, _offset) = 1""",
    "q19": """SELECT * FROM (SELECT auction, bidder, price, channel, url, dateTime, extra,
            row_number() OVER (PARTITION BY auction ORDER BY price DESC, _partition, _offset) AS n FROM bid)
        WHERE n <= 10""",
    "q20": """SELECT auction, bidder, price, channel, url, b.dateTime, b.extra, itemName, description, initialBid,
        reserve, a.dateTime, expires, seller, category, a.extra
        FROM bid AS b, auction AS a WHERE auction = a.id AND category = 10""",
    "q21": """SELECT * FROM (SELECT auction, bidder, price, channel, coalesce(
            (list_position(['apple', 'google', 'facebook', 'baidu'], lower(channel)) - 1)::VARCHAR,
            nullif(string_split(url, '&channel_id=')[2], '')) AS channel_id FROM bid)
        WHERE channel_id IS NOT NULL""",
    "q22": "SELECT auction, bidder, price, channel, f[4], f[5], f[6] "
    "FROM (SELECT *, string_split(url, '/') AS f FROM bid)",
    "q23": """SELECT bidder, price, channel, url, b.extra, p.id, name, emailAddress, creditCard, city, state, p.extra,
        itemName, description, initialBid, reserve, a.dateTime, expires, seller, category, a.extra
        FROM bid AS b JOIN person AS p ON bidder = p.id JOIN auction AS a ON seller = bidder""",
}
