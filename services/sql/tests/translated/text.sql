CREATE TABLE lines (line VARCHAR) WITH (topic = 'lines', format = 'text');
SELECT line FROM lines WHERE line LIKE 'error%';
