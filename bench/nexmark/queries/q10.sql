-- Log: bids with day and minute, by which a sink sorts them into files.
INSERT INTO nexmark_q10
SELECT auction, bidder, price, dateTime, extra, strftime(dateTime, '%Y-%m-%d') AS dt, strftime(dateTime, '%H:%M') AS hm
FROM bid
