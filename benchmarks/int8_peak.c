/* How fast this CPU multiplies int8 with the instructions of its tier: the tile of int8.c, again and again on operands in
 * the closest cache. Prints 10^9 operations a second, two for each multiply-add; the best of REPEATS.
 *
 *     cc -O3 OPTIONS_OF_THE_TIER -pthread int8_peak.c -o int8_peak -lm && ./int8_peak THREADS
 */

#include "../huarizo/kernels/int8.c"

#include <stdio.h>
#include <time.h>

enum { DEPTH = 256, TILES = 20000, REPEATS = 200 };

static void multiply_again(void *shared, int64_t thread, int64_t threads)
{
    static char left[TILE_ROWS * (DEPTH * WORD + LINE)], right[DEPTH * COLUMNS * WORD];
    ints sums[TILE_ROWS][VECTORS] = {0};
    for (int64_t i = 0; i < TILES; i++)
        multiply(TILE_ROWS, DEPTH, left, DEPTH * WORD + LINE, right, NULL, sums); /* adds, so that none is left out */
    (void)threads;
    memcpy((char *)shared + thread * (int64_t)sizeof sums, sums, sizeof sums); /* all are wanted */
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int main(int count, char **arguments)
{
    int64_t threads = count > 1 ? atoi(arguments[1]) : 1;
    char *results = malloc(threads * TILE_ROWS * VECTORS * (int64_t)sizeof(ints));
    double best = 0, each = 2.0 * TILE_ROWS * PASS * DEPTH * WORD / WIDE * TILES;
    for (int i = 0; i < REPEATS; i++) {
        double began = now();
        parallel(threads, multiply_again, results);
        double rate = 1e-9 * each * (double)threads / (now() - began);
        best = rate > best ? rate : best;
    }
    printf("%.1f\n", best);
    return 0;
}
