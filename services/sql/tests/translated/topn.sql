CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT auction, bidder, price FROM bid QUALIFY ROW_NUMBER() OVER (PARTITION BY auction ORDER BY price DESC, ts) <= 3;
SELECT auction, RANK() OVER w AS r, DENSE_RANK() OVER w AS d, LAG(price) OVER w AS before, LEAD(price, 2) OVER w AS later
FROM bid WINDOW w AS (PARTITION BY auction ORDER BY ts);
SELECT SUM(price) OVER (PARTITION BY bidder ORDER BY ts ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) AS spent FROM bid;
