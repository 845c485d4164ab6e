CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT ARG_MAX(bidder, price) AS buyer, ARG_MIN(bidder, price) AS least, APPROX_QUANTILE(price, 0.5) AS median FROM bid;
