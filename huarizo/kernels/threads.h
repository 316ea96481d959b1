/* Runs a function on several threads: those of torch's OpenMP runtime, or, where the compiler can't use it, threads that
 * are started for one call. Calls follow each other, so a second call sees all that the first one has written. */
#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>

typedef void Work(void *shared, int64_t thread, int64_t threads);

#ifdef _OPENMP

int omp_get_thread_num(void); /* declared here, because clang may lack omp.h */
int omp_get_num_threads(void);

static void parallel(int64_t threads, Work *work, void *shared)
{
#pragma omp parallel num_threads((int)threads)
    work(shared, omp_get_thread_num(), omp_get_num_threads());
}

#else

#include <pthread.h>

enum { MOST_THREADS = 256 };

typedef struct { Work *work; void *shared; int64_t thread, threads; } Share;

static void *start_share(void *argument)
{
    Share *share = argument;
    share->work(share->shared, share->thread, share->threads);
    return NULL;
}

static void parallel(int64_t threads, Work *work, void *shared)
{
    Share shares[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    int64_t own = 0; /* shares of threads that could not be started are done here */
    for (int64_t i = threads - 1; i >= 0; i--) {
        shares[i] = (Share){work, shared, i, threads};
        if (own || i == 0 || pthread_create(started + i, NULL, start_share, shares + i)) {
            if (!own)
                own = i + 1;
            start_share(shares + i);
        }
    }
    for (int64_t i = own; i < threads; i++)
        pthread_join(started[i], NULL);
}

#endif
#endif
