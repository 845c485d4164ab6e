-- Selection: bids for some auctions.
INSERT INTO nexmark_q2
SELECT auction, price FROM bid WHERE mod(auction, 123) = 0
