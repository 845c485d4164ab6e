CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
CREATE MATERIALIZED VIEW dear AS SELECT auction, price FROM bid WHERE price > 100;
CREATE TABLE dear_bids (auction BIGINT, price DOUBLE) WITH (topic = 'dear.bids');
CREATE SINK dear_sink INTO dear_bids AS SELECT auction, price FROM dear;
