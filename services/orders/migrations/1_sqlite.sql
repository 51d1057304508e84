CREATE TABLE orders_order (
    id             TEXT    PRIMARY KEY,
    user_id        TEXT    NOT NULL,
    product_id     TEXT    NOT NULL,
    quantity       INTEGER NOT NULL CHECK (quantity > 0),
    status         TEXT    NOT NULL CHECK (status IN
        ('pending', 'reserved', 'confirming', 'cancelling', 'confirmed', 'failed', 'cancelled')),
    reason         TEXT,
    reservation_id TEXT,
    -- Which try at a reservation this is.
    attempt        INTEGER NOT NULL DEFAULT 1,
    created_at     TEXT    NOT NULL,
    changed_at     TEXT    NOT NULL
);

-- What happened, to an order or to a product: one row for each event that was applied, and for each request that changed
-- an order. Nothing here is unique on purpose: an effect that happened twice shows.
CREATE TABLE orders_history (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    order_id   TEXT,
    product_id TEXT    NOT NULL,
    event_id   TEXT,
    event_type TEXT,
    what       TEXT    NOT NULL,
    at         TEXT    NOT NULL
);
CREATE INDEX orders_history_order ON orders_history (order_id, id);
CREATE INDEX orders_history_event ON orders_history (event_id);

-- Requests for more of a product. One at most is open for each product, however often it runs out meanwhile.
CREATE TABLE orders_procurement (
    id         TEXT    PRIMARY KEY,
    product_id TEXT    NOT NULL,
    opened_by  TEXT    NOT NULL,
    opened_at  TEXT    NOT NULL,
    closed_by  TEXT,
    closed_at  TEXT
);
CREATE UNIQUE INDEX orders_procurement_open ON orders_procurement (product_id) WHERE closed_at IS NULL;
CREATE INDEX orders_procurement_opened ON orders_procurement (opened_at);
