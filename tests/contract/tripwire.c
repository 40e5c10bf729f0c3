/* A tripwire: pulls SIGINT, or raises KeyboardInterrupt, at the k-th bytecode instruction that the
 * calling thread runs in the given source files.
 *
 * arm(prefixes, k, raise, again): prefixes is a tuple of beginnings of file names; k counts from 1, 0 never
 * pulls. On 3.11 it sets a trace function; later the caller has registered `on_instruction` with
 * sys.monitoring for the code of these files (3.13.0 loses opcode events of trace functions). With raise false the real way is taken: PyErr_SetInterrupt() does what the C signal handler
 * does, and KeyboardInterrupt is raised where the interpreter next looks for signals, and only there.
 * With raise true it is raised at the instruction itself, which no signal can do.
 * again: so many instructions later it is pulled once more, the real way; 0: never; -1: at each from there on.
 * disarm(): how many instructions were counted since arm().
 *
 * In C, because a trace function in Python would itself be looked at for signals.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *prefixes = NULL;
static long counted = 0;
static long pull_at = 0;
static long pull_again = 0;
static int raises = 0;
static unsigned long armed_in = 0;

/* Count one instruction; -1 with an exception set when it is to be raised here. */
static int
step(void)
{
    counted++;
    if (pull_at > 0 && counted > pull_at
        && (pull_again < 0 || (pull_again > 0 && counted == pull_at + pull_again))) {
        PyErr_SetInterrupt();
        return 0;
    }
    if (counted != pull_at) {
        return 0;
    }
    if (raises) {
        PyErr_SetNone(PyExc_KeyboardInterrupt);
        return -1;
    }
    PyErr_SetInterrupt();
    return 0;
}

#if PY_VERSION_HEX < 0x030C0000

static int
is_ours(PyFrameObject *frame)
{
    PyCodeObject *code = PyFrame_GetCode(frame);
    int ours = 0;
    for (Py_ssize_t i = 0; !ours && i < PyTuple_GET_SIZE(prefixes); i++) {
        ours = (int)PyUnicode_Tailmatch(code->co_filename, PyTuple_GET_ITEM(prefixes, i), 0,
                                        PY_SSIZE_T_MAX, -1);
    }
    Py_DECREF(code);
    return ours;
}

static int
on_event(PyObject *self, PyFrameObject *frame, int what, PyObject *arg)
{
    if (what == PyTrace_CALL && is_ours(frame)) {
        return PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", Py_True);
    }
    return what == PyTrace_OPCODE && is_ours(frame) ? step() : 0;
}

static PyObject *
on_instruction(PyObject *self, PyObject *args)
{
    Py_RETURN_NONE;
}

static void
start(void)
{
    PyEval_SetTrace(on_event, NULL);
}

static void
stop(void)
{
    PyEval_SetTrace(NULL, NULL);
}

#else

static PyObject *
on_instruction(PyObject *self, PyObject *args)
{
    if (armed_in != PyThread_get_thread_ident()) {
        Py_RETURN_NONE;
    }
    if (step() < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static void
start(void)
{
    armed_in = PyThread_get_thread_ident();
}

static void
stop(void)
{
    armed_in = 0;
}

#endif

static PyObject *
arm(PyObject *self, PyObject *args)
{
    PyObject *given;
    long k;
    int how;
    long again;
    if (!PyArg_ParseTuple(args, "O!lpl", &PyTuple_Type, &given, &k, &how, &again)) {
        return NULL;
    }
    Py_INCREF(given);
    Py_XSETREF(prefixes, given);
    counted = 0;
    pull_at = k;
    pull_again = again;
    raises = how;
    start();
    Py_RETURN_NONE;
}

static PyObject *
disarm(PyObject *self, PyObject *unused)
{
    stop();
    return PyLong_FromLong(counted);
}

static PyMethodDef methods[] = {
    {"arm", arm, METH_VARARGS, "arm(prefixes, k, raise, again)"},
    {"disarm", disarm, METH_NOARGS, "How many instructions were counted."},
    {"on_instruction", on_instruction, METH_VARARGS, "For sys.monitoring, INSTRUCTION."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "tripwire", "KeyboardInterrupt at the k-th instruction.", -1, methods,
};

PyMODINIT_FUNC
PyInit_tripwire(void)
{
    return PyModule_Create(&module);
}
