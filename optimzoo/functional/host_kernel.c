/* Steps of many float32 tensors by one call: what host_kernel.py compiles and calls, and documents.
 *
 * A table has a row of 64-bit numbers for each tensor: addresses first, then sizes. All tensors are contiguous. What
 * becomes of an element is the same wherever it lies and however many threads there are.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 8192, LANES = 32, SEGMENT = 1024, TILE = 32, SMALL = 1 << 15 };  /* elements */
enum { NONE, ALL, ROWS, COLUMNS };                                  /* the part of a tensor that has averages */
enum { SIGN, GRADIENT, NOTHING };                                   /* the direction of what has none */

typedef struct {
    float keep;               /* 1 - lr * weight_decay */
    float up;                 /* -1 where the step is to ascend */
    float beta1, beta2, eps;  /* of what has averages */
    float new1, new2;         /* 1 - beta1 and 1 - beta2, to their last digits */
    float rate;               /* lr of what has none, and SM3's */
    float rms;                /* the root mean square of a direction */
    int32_t part;
    int32_t free;   /* the direction of what has none */
    int32_t check;  /* whether gradients are left out in which a number, or the squares of a line, are not finite */
} Options;

typedef struct {
    int64_t w, g, exp_avg, exp_avg_sq;  /* addresses */
    int64_t index, chosen;              /* the address of the chosen rows or columns, ascending, and their number */
    int64_t rows, columns;
} Step;

typedef struct {
    float size, root;  /* lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) */
} Correction;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* As torch's: what is no number stays. */
static inline float larger(float a, float b) { return b > a || b != b ? b : a; }
static inline float smaller(float a, float b) { return b < a || b != b ? b : a; }

/* The one form keeps a constant as it is, however near 1 beta is; the other is exactly `new` where beta is 0. */
static inline float lerp(float old, float new, float beta, float rest) {
    return beta > 0.5f ? old + rest * (new - old) : new - beta * (new - old);
}

static void adamw(float *restrict w, const float *restrict g, float *restrict exp_avg, float *restrict exp_avg_sq,
                  int64_t n, Options o, Correction c) {
    for (int64_t i = 0; i < n; i++) {
        float x = o.up * g[i];
        float m = lerp(exp_avg[i], x, o.beta1, o.new1), v = lerp(exp_avg_sq[i], x * x, o.beta2, o.new2);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        w[i] = w[i] * o.keep - c.size * m / (sqrtf(v) * c.root + o.eps);
    }
}

static void stateless(float *restrict w, const float *restrict g, int64_t n, Options o) {
    const float size = o.up * o.rate;
    if (o.free == SIGN)
        for (int64_t i = 0; i < n; i++) w[i] = w[i] * o.keep - size * ((float)(g[i] > 0) - (float)(g[i] < 0));
    else if (o.free == GRADIENT)
        for (int64_t i = 0; i < n; i++) w[i] = w[i] * o.keep - size * g[i];
    else if (o.keep != 1)
        for (int64_t i = 0; i < n; i++) w[i] = w[i] * o.keep;
}

/* The first place in an ascending index that is not below `row`. */
static int64_t place(const int32_t *index, int64_t chosen, int64_t row) {
    int64_t low = 0, high = chosen;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (index[middle] < row) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* A row of which `chosen` columns have averages: they step in copies, which are put over what the others' rule does. */
static void some_columns(float *restrict w, const float *restrict g, float *restrict exp_avg,
                         float *restrict exp_avg_sq, const int32_t *restrict index, int64_t columns, int64_t chosen,
                         Options o, Correction c) {
    float some_w[SEGMENT], some_g[SEGMENT];
    for (int64_t start = 0, first = 0; start < columns; start += SEGMENT) {
        const int64_t end = least(start + SEGMENT, columns), n = place(index, chosen, end) - first;
        for (int64_t k = 0; k < n; k++) some_w[k] = w[index[first + k]];
        for (int64_t k = 0; k < n; k++) some_g[k] = g[index[first + k]];
        stateless(w + start, g + start, end - start, o);
        adamw(some_w, some_g, exp_avg + first, exp_avg_sq + first, n, o, c);
        for (int64_t k = 0; k < n; k++) w[index[first + k]] = some_w[k];
        first += n;
    }
}

static void line(const Step *s, int64_t row, Options o, Correction c) {
    const int64_t at = row * s->columns, n = s->columns;
    float *w = (float *)s->w + at, *exp_avg = (float *)s->exp_avg, *exp_avg_sq = (float *)s->exp_avg_sq;
    const float *g = (const float *)s->g + at;
    const int32_t *index = (const int32_t *)s->index;
    if (o.part == COLUMNS) {
        const int64_t k = row * s->chosen;
        some_columns(w, g, exp_avg + k, exp_avg_sq + k, index, n, s->chosen, o, c);
        return;
    }
    const int64_t k = place(index, s->chosen, row);
    if (k < s->chosen && index[k] == row) adamw(w, g, exp_avg + k * n, exp_avg_sq + k * n, n, o, c);
    else stateless(w, g, n, o);
}

/* Two halves side by side: a core reads two streams a fifth faster than one. */
static float squares(const float *g, int64_t n) {
    const int64_t half = n / 2;
    const float *other = g + half;
    float sums[LANES] = {0}, others[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES)
        for (int l = 0; l < LANES; l++) {
            sums[l] += g[i + l] * g[i + l];
            others[l] += other[i + l] * other[i + l];
        }
    for (; i < half; i++) sum += g[i] * g[i] + other[i] * other[i];
    for (i = 2 * half; i < n; i++) sum += g[i] * g[i];
    for (int l = 0; l < LANES; l++) sum += sums[l] + others[l];
    return sum;
}

/* Inside of a parallel region, before anybody steps: whether a gradient may be used. `bad` is 0 before. */
static int usable(const float *g, int64_t n, int32_t *bad) {
    #pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < n; at += LINE)
        if (!isfinite(squares(g + at, least(LINE, n - at)))) {
            #pragma omp atomic write
            *bad = 1;
        }
    #pragma omp barrier
    return !*bad;
}

/* The largest size of a number, and what is none where there is one, of a gradient that is checked as in `step`. */
float largest(const float *g, int64_t n, int32_t *bad, const Options *options, int threads) {
    float most = 0;
    #pragma omp parallel num_threads(threads) if (n > SMALL)
    {
        float found[LANES] = {0}, mine = 0;
        if (!options->check || usable(g, n, bad)) {
            #pragma omp for schedule(static) nowait
            for (int64_t at = 0; at < n; at += LANES) {
                const int64_t end = least(LANES, n - at);
                for (int64_t l = 0; l < end; l++) found[l] = larger(found[l], fabsf(g[at + l]));
            }
        }
        for (int l = 0; l < LANES; l++) mine = larger(mine, found[l]);
        #pragma omp critical
        most = larger(most, mine);
    }
    return most;
}

/* A rule without state on what a basis leaves of each number of a gradient: `inside` is what lies in it. A sign is 0
 * where that is below `noise`. */
void outside(float *restrict w, const float *restrict g, const float *restrict inside, int64_t n, float noise,
             const Options *options, int threads) {
    const Options o = *options;
    const float size = o.up * o.rate;
    #pragma omp parallel for schedule(static) num_threads(threads) if (n > SMALL)
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t end = least(LANES, n - at);
        for (int64_t l = 0; l < end; l++) {
            const int64_t i = at + l;
            const float left = g[i] - inside[i], sign = (float)(left >= noise) - (float)(left <= -noise);
            w[i] = w[i] * o.keep - size * (o.free == SIGN ? sign : o.free == GRADIENT ? left : 0);
        }
    }
}

/* Whether an index is what `line` relies on. A checkpoint may hold anything. */
static int ascends(const int32_t *index, int64_t chosen, int64_t end) {
    int64_t last = -1;
    for (int64_t k = 0; k < chosen; k++) {
        if (index[k] <= last || index[k] >= end) return 0;
        last = index[k];
    }
    return 1;
}

/* AdamW on a part of each tensor, a rule without state on the rest. `bad`, 0 before, tells which were left alone.
 * Returns the number of a tensor whose index is none, in which case nothing was done; -1 without one. */
int64_t step(const Step *table, const Correction *corrections, int32_t *bad, int64_t tensors, const Options *options,
             int64_t elements, int threads) {
    const Options o = *options;
    for (int64_t t = 0; t < tensors; t++)
        if (!ascends((const int32_t *)table[t].index, table[t].chosen, o.part == ROWS ? table[t].rows : table[t].columns))
            return t;
    #pragma omp parallel num_threads(threads) if (elements > SMALL)
    for (int64_t t = 0; t < tensors; t++) {
        const Step *s = table + t;
        const int64_t size = s->rows * s->columns;
        if (o.check && !usable((const float *)s->g, size, bad + t)) continue;
        if (o.part == ROWS || o.part == COLUMNS) {
            #pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < s->rows; row++) line(s, row, o, corrections[t]);
        } else {
            #pragma omp for schedule(static) nowait
            for (int64_t at = 0; at < size; at += LINE) {
                const int64_t n = least(LINE, size - at);
                float *w = (float *)s->w + at;
                const float *g = (const float *)s->g + at;
                if (o.part == NONE) stateless(w, g, n, o);
                else adamw(w, g, (float *)s->exp_avg + at, (float *)s->exp_avg_sq + at, n, o, corrections[t]);
            }
        }
    }
    return -1;
}

/* One row of SM3: the smaller of its accumulator and of the column's, plus g^2; returns the largest of them. */
static float cover(float *restrict w, const float *restrict g, const float *restrict column, float *restrict highest,
                   int64_t n, float row, Options o) {
    float most[LANES] = {0}, found = 0;
    for (int64_t start = 0; start < n; start += LANES) {
        const int64_t end = least(LANES, n - start);
        for (int64_t l = 0; l < end; l++) {
            const int64_t i = start + l;
            const float x = o.up * g[i], nu = smaller(row, column[i]) + x * x;
            most[l] = larger(most[l], nu);
            highest[i] = larger(highest[i], nu);
            w[i] = w[i] * o.keep - o.rate * (x / (sqrtf(nu) + o.eps));
        }
    }
    for (int l = 0; l < LANES; l++) found = larger(found, most[l]);
    return found;
}

/* SM3 on a matrix, with an accumulator for each row and for each column; `room` has a row of zeros for each thread. */
void sm3(float *w, const float *g, float *row, float *column, float *room, int32_t *bad, int64_t rows, int64_t columns,
         const Options *options, int threads) {
    #pragma omp parallel num_threads(threads) if (rows * columns > SMALL)
    if (!options->check || usable(g, rows * columns, bad)) {
        #pragma omp for schedule(static)
        for (int thread = 0; thread < threads; thread++) {
            float *highest = room + thread * columns;
            const int64_t first = rows * thread / threads, last = rows * (thread + 1) / threads;
            for (int64_t r = first; r < last; r++)
                row[r] = cover(w + r * columns, g + r * columns, column, highest, columns, row[r], *options);
        }
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < columns; i++) {
            float most = 0;
            for (int thread = 0; thread < threads; thread++) most = larger(most, room[thread * columns + i]);
            column[i] = most;
        }
    }
}

typedef uint16_t bfloat16;

static inline float wide(bfloat16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

static double sum(const double *parts, int64_t n) {
    double found = 0;
    for (int64_t i = 0; i < n; i++) found += parts[i];
    return found;
}

static double narrow_squares(const bfloat16 *x, int64_t n) {
    float sums[LANES] = {0};
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t end = least(LANES, n - at);
        for (int64_t l = 0; l < end; l++) sums[l] += wide(x[at + l]) * wide(x[at + l]);
    }
    double found = 0;
    for (int l = 0; l < LANES; l++) found += sums[l];
    return found;
}

static void move(float *restrict w, const bfloat16 *restrict u, int64_t n, float keep, float size) {
    for (int64_t i = 0; i < n; i++) w[i] = w[i] * keep - size * wide(u[i]);
}

/* `m` rows from `row` on and `n` columns from `column` on of a matrix whose columns lie in lines of `rows`. */
static void turn(bfloat16 tile[TILE][TILE], const bfloat16 *x, int64_t rows, int64_t row, int64_t m, int64_t column,
                 int64_t n) {
    x += column * rows + row;
    if (m < TILE || n < TILE) {
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) tile[i][j] = x[j * rows + i];
        return;
    }
    for (int j = 0; j < TILE; j += 4) {  /* four numbers at a time */
        bfloat16 four[TILE][4];
        for (int i = 0; i < TILE; i++)
            for (int k = 0; k < 4; k++) four[i][k] = x[(j + k) * rows + i];
        for (int i = 0; i < TILE; i++) memcpy(&tile[i][j], four[i], sizeof four[i]);
    }
}

/* What brings `n` numbers of these squares to the root mean square `rms`, which is not 0; zeros stay zeros. */
static float scale(double squares, float rms, int64_t n) {
    return squares == 0 ? 0 : 1 / larger(FLT_MIN, (float)sqrt(squares) / (rms * sqrtf((float)n)));
}

/* w (rows, columns) <- keep w - rate x, with x at the root mean square `rms`. It lies on its side where it is `turned`;
 * `parts` has room for a sum of each line. */
void conclude(float *w, const bfloat16 *x, double *parts, int64_t rows, int64_t columns, int turned,
              const Options *options, int threads) {
    const Options o = *options;
    const int64_t n = rows * columns, lines = (n + LINE - 1) / LINE, blocks = (rows + TILE - 1) / TILE;
    #pragma omp parallel num_threads(threads) if (n > SMALL)
    {
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < lines; i++) parts[i] = narrow_squares(x + i * LINE, least(LINE, n - i * LINE));
        const float size = o.rate * scale(sum(parts, lines), o.rms, n);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t row = i * TILE, m = least(TILE, rows - row), at = row * columns;
            if (!turned) move(w + at, x + at, m * columns, o.keep, size);
            else for (int64_t column = 0; column < columns; column += TILE) {
                const int64_t k = least(TILE, columns - column);
                bfloat16 tile[TILE][TILE];
                turn(tile, x, rows, row, m, column, k);
                for (int64_t j = 0; j < m; j++) move(w + at + j * columns + column, tile[j], k, o.keep, size);
            }
        }
    }
}
