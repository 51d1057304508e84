CREATE TABLE orders_order (
    id             uuid        PRIMARY KEY,
    user_id        uuid        NOT NULL,
    product_id     text        NOT NULL,
    quantity       bigint      NOT NULL CHECK (quantity > 0),
    status         text        NOT NULL CHECK (status IN
        ('pending', 'reserved', 'confirming', 'cancelling', 'confirmed', 'failed', 'cancelled')),
    reason         text,
    reservation_id uuid,
    -- Which try at a reservation this is.
    attempt        integer     NOT NULL DEFAULT 1,
    created_at     timestamptz NOT NULL,
    changed_at     timestamptz NOT NULL
);

-- What happened, to an order or to a product: one row for each event that was applied, and for each request that changed
-- an order. Nothing here is unique on purpose: an effect that happened twice shows.
CREATE TABLE orders_history (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id   uuid,
    product_id text        NOT NULL,
    event_id   text,
    event_type text,
    what       text        NOT NULL,
    at         timestamptz NOT NULL
);
CREATE INDEX orders_history_order ON orders_history (order_id, id);
CREATE INDEX orders_history_event ON orders_history (event_id);

-- Requests for more of a product. One at most is open for each product, however often it runs out meanwhile.
CREATE TABLE orders_procurement (
    id         uuid        PRIMARY KEY,
    product_id text        NOT NULL,
    opened_by  text        NOT NULL,
    opened_at  timestamptz NOT NULL,
    closed_by  text,
    closed_at  timestamptz
);
CREATE UNIQUE INDEX orders_procurement_open ON orders_procurement (product_id) WHERE closed_at IS NULL;
CREATE INDEX orders_procurement_opened ON orders_procurement (opened_at);
