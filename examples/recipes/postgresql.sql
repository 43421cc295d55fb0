CREATE TABLE IF NOT EXISTS uplink (
    message_id bigint PRIMARY KEY,
    stored_at timestamptz NOT NULL,
    topic text NOT NULL,
    product_key text NOT NULL,
    device_name text NOT NULL,
    origin text NOT NULL,
    payload bytea NOT NULL -- as JSON: convert_from(payload, 'UTF8')::jsonb
);
CREATE INDEX IF NOT EXISTS uplink_of_device ON uplink (product_key, device_name, stored_at);
