/* Serves calls of one kernel's functions, read from the standard input and answered on the standard output. It is built
 * with the kernel's source for a tier (on_any_cpu.py), so it runs under an emulator, or with sanitizers, as well as by itself.
 *
 *     request   function, buffers (int32 each); Call; for each buffer: its pointer's offset in Call, its size and how
 *               far it lies behind a multiple of 16 (int64 each); and its bytes
 *     answer    what the function returned (int32), and the bytes of every buffer afterwards
 *
 * Every buffer is allocated by itself with exactly its size, so that an access beyond its end is seen. When it starts,
 * the driver writes the size of Call (int64).
 */
#include KERNEL

#include <stdio.h>
#include <stdlib.h>

typedef int Function(const Call *call);

#define FUNCTION(name) huarizo_##name,
static Function *const functions[] = {FUNCTIONS};

typedef struct { int64_t pointer, size, behind; char *block; } Buffer;

static void read_all(void *to, size_t size)
{
    if (size && fread(to, size, 1, stdin) != 1)
        exit(1);
}

static void write_all(const void *from, size_t size)
{
    if (size && fwrite(from, size, 1, stdout) != 1)
        exit(1);
}

static void serve(int32_t function, int32_t count)
{
    Call call;
    Buffer *buffers = malloc((count + 1) * sizeof *buffers);
    if (!buffers)
        exit(1);
    read_all(&call, sizeof call);
    for (int32_t i = 0; i < count; i++) {
        Buffer *buffer = buffers + i;
        read_all(buffer, 3 * sizeof(int64_t));
        buffer->block = malloc(buffer->behind + buffer->size);
        if (!buffer->block && buffer->behind + buffer->size)
            exit(1);
        char *data = buffer->block + buffer->behind;
        read_all(data, buffer->size);
        memcpy((char *)&call + buffer->pointer, &data, sizeof data);
    }
    int32_t status = functions[function](&call);
    write_all(&status, sizeof status);
    for (int32_t i = 0; i < count; i++) {
        write_all(buffers[i].block + buffers[i].behind, buffers[i].size);
        free(buffers[i].block);
    }
    free(buffers);
    fflush(stdout);
}

int main(void)
{
    int64_t size = huarizo_call_size();
    write_all(&size, sizeof size);
    fflush(stdout);
    for (int32_t head[2]; fread(head, sizeof head, 1, stdin) == 1;)
        serve(head[0], head[1]);
    return 0;
}
