CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT channel, LENGTH(channel) AS size, COUNT(*) AS n, COUNT(DISTINCT bidder) FILTER (WHERE price > 10) AS many, SUM(price) AS s, AVG(price) AS a,
  MIN(price) AS low, MAX(price) AS high, APPROX_COUNT_DISTINCT(bidder) AS about
FROM bid WHERE price IS NOT NULL AND NOT channel IN ('a', 'b') GROUP BY channel, size HAVING n > 5 OR COUNT(*) > 3 ORDER BY n DESC LIMIT 10;
